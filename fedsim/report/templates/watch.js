// Asks for the runs every two seconds and draws those that are ticked. Names come from folders: they are only ever set as text.
(function () {
  "use strict";
  const root = document.documentElement;
  const $ = (id) => document.getElementById(id);
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const MOST = 8; // curves that are ticked by themselves
  const ticked = new Map(); // run -> chosen by hand
  const colours = new Map(); // run -> index, which it keeps
  let last = "";

  const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const variable = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const shown = (run, place) => (ticked.has(run.name) ? ticked.get(run.name) : place < MOST && run.x.length > 0);

  function index(name) {
    if (!colours.has(name)) colours.set(name, colours.size);
    return colours.get(name);
  }

  function axis(text) {
    return {
      title: { text, standoff: 8, font: { size: 12, color: variable("muted") } }, gridcolor: variable("grid"), zeroline: false,
      automargin: true, tickfont: { size: 12, color: variable("muted") },
    };
  }

  function draw(runs) {
    const chosen = runs.filter(shown);
    $("chart-section").hidden = chosen.length === 0;
    if (!chosen.length) return Promise.resolve();
    const metrics = [...new Set(chosen.map((run) => run.metric))];
    const traces = chosen.map((run) => {
      const i = index(run.name);
      return {
        type: "scatter", mode: run.x.length < 3 ? "lines+markers" : "lines", x: run.x, y: run.y, name: run.name,
        line: { color: variable("c" + (i % 8)), width: 2, dash: DASHES[Math.floor(i / 8) % 4] },
      };
    });
    const narrow = window.innerWidth <= 720;
    return Plotly.react($("chart"), traces, {
      height: 420, autosize: true, margin: { l: 52, r: 14, t: 10, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: variable("ink") }, xaxis: axis("round"),
      yaxis: axis(metrics.length === 1 ? (metrics[0] || "").replace(".", " ") : "score"), showlegend: true, uirevision: "kept",
      legend: { orientation: "h", x: 0, y: -0.2, yanchor: "top" }, dragmode: narrow ? false : "zoom",
      hovermode: "x unified", hoverdistance: -1,
      hoverlabel: { bgcolor: variable("raised"), bordercolor: variable("line"), font: { color: variable("ink"), size: 12 }, namelength: 40 },
    }, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  function cell(row, text, kind) {
    const td = row.insertCell();
    if (kind) td.className = kind;
    if (text instanceof Node) td.append(text); else td.textContent = text;
    return td;
  }

  function make(tag, properties) {
    return Object.assign(document.createElement(tag), properties);
  }

  function ago(seconds) {
    if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
    return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
  }

  function table(runs) {
    const focused = document.activeElement && document.activeElement.dataset.key; // rows are made anew, and it must not be lost
    const body = make("tbody", { id: "rows" });
    runs.forEach((run, place) => {
      const row = body.insertRow();
      const box = make("input", { type: "checkbox", checked: shown(run, place) });
      box.setAttribute("aria-label", "show " + run.name);
      box.dataset.key = "box " + run.name;
      box.addEventListener("change", () => { ticked.set(run.name, box.checked); draw(runs); });
      cell(row, box, "word");
      const link = make("a", { href: run.link, textContent: run.name === "." ? "this folder" : run.name });
      link.dataset.key = "link " + run.name;
      cell(row, link, "word");
      cell(row, make("span", { className: "state " + run.state, textContent: run.state, title: run.why || "" }), "word");
      cell(row, run.strategy || "", "word");
      cell(row, run.seed ?? "");
      const progress = cell(row, make("span", { className: "progress" }), "word");
      const bar = make("i", {});
      bar.style.width = `${run.rounds ? (100 * run.round) / run.rounds : 0}%`;
      progress.firstChild.append(bar);
      progress.append(`${run.round} / ${run.rounds}`);
      cell(row, typeof run.value === "number" ? run.value.toFixed(4) : "–").title = run.metric || "";
      cell(row, ago(run.age));
    });
    $("rows").replaceWith(body);
    if (focused) [...body.querySelectorAll("[data-key]")].find((each) => each.dataset.key === focused)?.focus();
  }

  function tell(news) {
    $("folder").textContent = news.folder;
    document.title = `${news.folder} · fedsim`;
    const count = (state) => news.runs.filter((run) => run.state === state).length;
    const parts = [["running", "running"], ["finished", "finished"], ["unfinished", "unfinished"], ["failed", "failed"]]
      .filter(([state]) => count(state)).map(([state, word]) => `${count(state)} ${word}`);
    $("state").textContent = news.runs.length ? parts.join(", ") : "No run in this folder yet. It appears here as soon as one starts.";
    $("runs-section").hidden = !news.runs.length;
    $("studies-section").hidden = !news.studies.length;
    $("studies").replaceChildren(...news.studies.map((study) => {
      const item = make("li", {});
      item.append(make("a", { href: study.link, textContent: study.name === "." ? news.folder : study.name }));
      return item;
    }));
    table(news.runs);
    return draw(news.runs);
  }

  async function ask() {
    try {
      const answer = await fetch("/runs", { cache: "no-store" });
      last = await answer.json();
      await tell(last);
      root.dataset.drawn = theme();
    } catch (error) {
      $("state").textContent = "The server does not answer; is fedsim watch still running?";
    }
    setTimeout(ask, 2000);
  }

  try {
    const kept = localStorage.getItem("fedsim-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch (error) { /* no storage here */ }
  $("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("fedsim-theme", root.dataset.theme); } catch (error) { /* no storage here */ }
    if (last) tell(last).then(() => { root.dataset.drawn = theme(); });
  });
  system.addEventListener("change", () => last && tell(last));
  ask();
})();
