"""A Flower app as its users write it: plain PyTorch, its own data, global generators. It knows nothing of fedsim."""

import random

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

DIGITS = load_digits()
X, Y = torch.from_numpy(DIGITS.data).float() / 16, torch.from_numpy(DIGITS.target)
TRAIN = 1400


def net(counts: bool = False) -> torch.nn.Module:
    """A perceptron; `counts`: with a layer that has running statistics, and counts batches in whole numbers."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(16) if counts else torch.nn.LayerNorm(16)
    return torch.nn.Sequential(torch.nn.Linear(64, 16), norm, torch.nn.ReLU(), torch.nn.Linear(16, 10))


def accuracy(arrays: ArrayRecord) -> float:
    model = net()
    model.load_state_dict(arrays.to_torch_state_dict())
    with torch.no_grad():
        return float((model.eval()(X[TRAIN:]).argmax(1) == Y[TRAIN:]).float().mean())


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    i, n = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    if context.run_config.get("broken") == i:
        raise RuntimeError("no data today")
    mine = torch.arange(i, TRAIN, n)[: 40 + 15 * i]
    model = net(bool(context.run_config.get("counts")))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    anchor = [p.detach().clone() for p in model.parameters()]
    mu = float(message.content["config"].get("proximal-mu", 0.0))
    total = 0.0
    model.train()
    for x, y in DataLoader(TensorDataset(X[mine], Y[mine]), batch_size=16, shuffle=True):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x + 0.01 * float(np.random.rand()) * random.random()), y)  # noqa: NPY002
        total += float(loss.detach()) * len(y)
        (loss + mu / 2 * sum((p - a).square().sum() for p, a in zip(model.parameters(), anchor, strict=True))).backward()
        optimiser.step()
    rounds = int(context.state.get("seen", ConfigRecord({"rounds": 0}))["rounds"]) + 1
    context.state["seen"] = ConfigRecord({"rounds": rounds})
    metrics = {"num-examples": len(mine), "train_loss": total / len(mine)}
    if context.run_config.get("says-who"):
        metrics["partition-id"] = i
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 1, "accuracy": accuracy(message.content["arrays"])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(fraction_train=0.5).start(grid, ArrayRecord(net().state_dict()), num_rounds=2)
    context.state["accuracy"] = MetricRecord({"accuracy": accuracy(result.arrays)})
