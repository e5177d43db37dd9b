// Draws the page's figures, in the colours of the theme. Names of colours: @c0 to @c7 (strategies), a tilde after one for a band,
// @ink, @muted, @grid, and the scales @heat and @diverging.
(function () {
  "use strict";
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 720px)");

  const SCALES = {
    light: {
      heat: [[0, "#dbe7f3"], [0.25, "#b3cde7"], [0.5, "#6ba6d6"], [0.75, "#2171b5"], [1, "#08306b"]],
      diverging: [[0, "#efa877"], [0.5, "#f4f5f7"], [1, "#82b6e2"]],
    },
    dark: {
      heat: [[0, "#22344d"], [0.25, "#26507f"], [0.5, "#2f6fae"], [0.75, "#6fb1ea"], [1, "#e3f1ff"]],
      diverging: [[0, "#92481a"], [0.5, "#202733"], [1, "#1f5f99"]],
    },
  };

  function theme() {
    return root.dataset.theme || (system.matches ? "dark" : "light");
  }

  function variable(name) {
    return getComputedStyle(root).getPropertyValue("--" + name).trim();
  }

  function faded(hex) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${theme() === "dark" ? 0.22 : 0.15})`;
  }

  const WORDS = new Set(["name", "legendgroup", "text", "ticktext", "x", "y", "hovertemplate"]); // names of the user's, not of colours

  function resolve(value) {
    if (Array.isArray(value)) return value.map(resolve);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, WORDS.has(k) ? v : resolve(v)]));
    }
    if (typeof value !== "string" || value[0] !== "@") return value;
    const name = value.slice(1);
    if (name in SCALES.light) return SCALES[theme()][name];
    return name.endsWith("~") ? faded(variable(name.slice(0, -1))) : variable(name);
  }

  function axis(given) {
    const common = {
      gridcolor: variable("grid"), linecolor: variable("line"), zeroline: false, automargin: true, ticks: "",
      title: { standoff: 8, font: { size: 12, color: variable("muted") } }, tickfont: { size: 12, color: variable("muted") },
    };
    const title = Object.assign({}, common.title, given.title);
    return Object.assign(common, given, { title });
  }

  function layout(spec) {
    const given = resolve(spec.layout);
    const curves = spec.data.every((trace) => trace.type === "scatter" && String(trace.mode).startsWith("lines"));
    return Object.assign(
      {
        height: spec.height, autosize: true, margin: { l: 52, r: 14, t: 10, b: 44 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: variable("ink") },
        legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 } },
        hoverlabel: { bgcolor: variable("raised"), bordercolor: variable("line"), font: { color: variable("ink"), size: 12 } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("muted"), activecolor: variable("ink"), orientation: "v" },
        dragmode: narrow.matches ? false : "zoom",
        hovermode: curves ? "x unified" : "closest", hoverdistance: curves ? -1 : 20, // curves: all values at the nearest round
      },
      given,
      { xaxis: axis(given.xaxis || {}), yaxis: axis(given.yaxis || {}) },
    );
  }

  const config = {
    responsive: true, displaylogo: false, displayModeBar: !narrow.matches,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], toImageButtonOptions: { format: "svg" },
  };
  const plots = Array.from(document.querySelectorAll(".plot"));

  function draw() {
    return Promise.all(plots.map((div) => {
      const spec = specs[Number(div.dataset.figure)];
      return Plotly.react(div, resolve(spec.data), layout(spec), config);
    })).then(() => { root.dataset.drawn = theme(); });
  }

  function remember(value) {
    try { localStorage.setItem("fedsim-theme", value); } catch (error) { /* a file without storage: the choice lasts as long as the page */ }
  }

  try {
    const kept = localStorage.getItem("fedsim-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch (error) { /* no storage here */ }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
    draw();
  });
  system.addEventListener("change", draw);
  document.querySelectorAll("details").forEach((each) => each.addEventListener("toggle", () => window.dispatchEvent(new Event("resize"))));

  let before;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme || "";
    root.dataset.theme = "light";
    root.classList.add("printing");
    draw();
    plots.forEach((div) => Plotly.relayout(div, { width: div.clientWidth }));
  });
  window.addEventListener("afterprint", () => {
    root.classList.remove("printing");
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    draw();
    plots.forEach((div) => Plotly.relayout(div, { width: null, autosize: true }));
  });

  draw();
})();
