// Charts by plotly, whose JavaScript the server takes out of the installed Python package. index.html begins to fetch it
// beside our own modules; it is compiled, which holds up the page for most of a second, when somebody first asks for it.

import { clearSketch } from "./sketch.js";

export const COLORS = ["#1f77b4", "#d95f02", "#2b9348", "#7b4fb5", "#c2185b", "#8c6d31", "#00838f", "#616161"];
let loading = null;

export function library() {
  loading = loading || new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const judge = () => (window.Plotly ? resolve(window.Plotly) : reject(new Error("the chart library did not load")));
    script.addEventListener("load", judge);
    script.addEventListener("error", judge);
    script.src = "/charts.js";
    document.head.append(script);
  });
  return loading;
}

// Axis titles are markup to the library: names come from environments, so what could begin a tag is taken out.
const plain = (name) => String(name).replaceAll("<", "‹").replaceAll("&", "＆");

// lines: [{name, x, y, band?: {low, high}}]
export async function drawLines(node, lines, { title = "", log = false, xTitle = "" } = {}) {
  const plotly = await library();
  if (!node.isConnected) return;
  clearSketch(node);
  const traces = [];
  lines.forEach((line, i) => {
    const color = COLORS[i % COLORS.length];
    if (line.band) {
      const shape = { x: line.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      traces.push({ ...shape, y: line.band.low }, { ...shape, y: line.band.high, fill: "tonexty", fillcolor: color + "33" });
    }
    traces.push({ x: line.x, y: line.y, name: plain(line.name), mode: line.y.length < 40 ? "lines+markers" : "lines",
      line: { width: 1.5, color }, marker: { size: 4 }, connectgaps: false });
  });
  await plotly.react(node, traces, layout(title, { log, xTitle, legend: lines.length > 1 }), options(title));
  performance.mark("chart"); // for whoever measures the page: a driven browser is slower than one left alone
}

// spans: [{process, activity, start_s, end_s}]
export async function drawTimeline(node, spans) {
  const plotly = await library();
  if (!node.isConnected) return;
  const activities = [...new Set(spans.map((span) => String(span.activity)))];
  const traces = activities.map((activity, i) => {
    const mine = spans.filter((span) => String(span.activity) === activity);
    return { type: "bar", orientation: "h", name: plain(activity), marker: { color: COLORS[i % COLORS.length], opacity: 0.6 },
      y: mine.map((span) => plain(span.process)), x: mine.map((span) => span.end_s - span.start_s),
      base: mine.map((span) => span.start_s) };
  });
  const shape = layout("", { xTitle: "seconds since the run began", legend: true });
  await plotly.react(node, traces, { ...shape, barmode: "overlay", yaxis: { type: "category", automargin: true } }, options("timeline"));
}

// panels: [{name, counts, edges}], drawn as bars between their edges, side by side
export async function drawHistograms(nodes, panels) {
  const plotly = await library();
  await Promise.all(panels.map(({ name, counts, edges }, i) => {
    if (!nodes[i].isConnected) return null;
    const bars = { type: "bar", marker: { color: COLORS[0] }, x: counts.map((_, k) => (edges[k] + edges[k + 1]) / 2), y: counts,
      width: counts.map((_, k) => edges[k + 1] - edges[k]) };
    return plotly.react(nodes[i], [bars], { ...layout(name), bargap: 0 }, options(name));
  }));
}

// panels: [{name, edges, counts, log?}] over columns of steps; a cell's color is its share of its column. A click on a
// column calls onstep with its last step.
export async function drawHeatMaps(nodes, steps, panels, onstep) {
  const plotly = await library();
  await Promise.all(panels.map(async ({ name, edges, counts, log }, i) => {
    if (!nodes[i].isConnected) return;
    const totals = counts.map((column) => column.reduce((a, b) => a + b, 0) || 1);
    const z = counts[0].map((_, bin) => counts.map((column, k) => (column[bin] ? column[bin] / totals[k] : null)));
    const cells = { type: "heatmap", x: [...steps.map(([first]) => first - 0.5), steps[steps.length - 1][1] + 0.5], y: edges, z,
      colorscale: [[0, "#e8f0f7"], [1, "#0b3d68"]], zmin: 0, zmax: 1, showscale: false,
      hovertemplate: "step %{x}: %{z:.0%} at %{y}<extra></extra>" };
    await plotly.react(nodes[i], [cells], layout(name, { log, xTitle: "step" }), options(name));
    nodes[i].on("plotly_click", ({ points }) => {
      const column = steps.find(([, last]) => points[0].x <= last + 0.5);
      if (column) onstep(column[1]);
    });
  }));
}

export async function forget(nodes) {
  if (loading) nodes.forEach((node) => window.Plotly && window.Plotly.purge(node));
}

// A title would lie under a legend: beside one it is the y-axis's.
function layout(title, { log = false, xTitle = "", legend = false } = {}) {
  const [ink, line, paper] = ["--ink", "--line", "--paper"].map((name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return {
    paper_bgcolor: paper, plot_bgcolor: paper, font: { color: ink },
    title: { text: legend ? "" : plain(title), font: { size: 12 }, x: 0.02, xanchor: "left" },
    margin: { l: 52, r: 10, t: 28, b: 34 }, showlegend: legend, legend: { font: { size: 10 }, orientation: "h", y: 1.02, yanchor: "bottom" },
    xaxis: { title: { text: xTitle, font: { size: 11 }, standoff: 4 }, gridcolor: line },
    yaxis: { title: { text: legend ? plain(title) : "", font: { size: 11 }, standoff: 6 }, type: log ? "log" : "linear", gridcolor: line, zeroline: false, automargin: true }, hovermode: "closest",
  };
}

function options(title) {
  const filename = title.replace(/[^a-z0-9]+/gi, "-") || "chart";
  const csv = { name: "csv", title: "CSV of what is drawn", icon: window.Plotly.Icons.disk, click: (node) => save(csvOf(node.data), `${filename}.csv`) };
  return { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"], modeBarButtonsToAdd: [csv], toImageButtonOptions: { format: "png", filename, scale: 2 } };
}

// One line for each point: name, x, y, and z of a heat map, start of a bar. A spreadsheet must not take a name for a formula.
export function csvOf(traces) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const rows = traces.filter((trace) => trace.hoverinfo !== "skip").flatMap((trace) => {
    const name = trace.name || "";
    if (trace.z) return trace.z.flatMap((line, i) => Array.from(line, (value, k) => [name, trace.x[k], trace.y[i], value]));
    return Array.from(trace.x, (x, i) => [name, x, trace.y[i], trace.base ? trace.base[i] : ""]);
  });
  const last = traces.some((trace) => trace.z) ? "share" : traces.some((trace) => trace.base) ? "start" : "";
  return [["name", "x", "y", last], ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function save(text, name) {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
}

// Exponential moving average that ignores gaps; weight 0 changes nothing.
export function smooth(values, weight) {
  let mean = null;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean === null ? value : weight * mean + (1 - weight) * value;
    return mean;
  });
}

// Mean and range over lines, at the x values of the longest within what all of them cover; between two points of a line
// lies the straight line, for seeds agree in their steps but not in their tokens and seconds.
export function meanBand(name, lines) {
  const known = lines.map((line) => line.x.map((x, i) => [x, line.y[i]]).filter(([, y]) => y !== null));
  if (known.some((points) => !points.length)) return { name, x: [], y: [], band: { low: [], high: [] } };
  const start = Math.max(...known.map((points) => points[0][0]));
  const end = Math.min(...known.map((points) => points[points.length - 1][0]));
  const longest = known.reduce((a, b) => (b.length > a.length ? b : a));
  const x = longest.map(([at]) => at).filter((at) => at >= start && at <= end);
  const read = known.map(reader);
  const columns = x.map((at) => read.map((value) => value(at)));
  const y = columns.map((column) => column.reduce((a, b) => a + b, 0) / column.length);
  return { name, x, y, band: { low: columns.map((c) => Math.min(...c)), high: columns.map((c) => Math.max(...c)) } };
}

// at -> y of sorted points, for growing `at`
function reader(points) {
  let i = 0;
  return (at) => {
    while (i < points.length - 1 && points[i + 1][0] <= at) i += 1;
    const [[x, y], [x2, y2]] = [points[i], points[Math.min(i + 1, points.length - 1)]];
    return x === at || x2 === x ? y : y + ((y2 - y) * (at - x)) / (x2 - x);
  };
}
