// A chart by a few SVG elements of our own, for the second that the chart library takes to be loaded and compiled: the
// same lines, their range and no more. charts.js replaces it.

import { num } from "./dom.js";

const [WIDTH, HEIGHT] = [400, 235];
const BOX = { left: 52, right: 390, top: 28, bottom: 205 };

// lines: [{x, y}] as drawLines takes them
export function sketch(node, lines, { title = "", colors = ["#1f77b4"] } = {}) {
  const points = lines.map(({ x, y }) => x.map((at, i) => [at, y[i]]).filter(([, value]) => value !== null));
  const all = points.flat();
  if (window.Plotly || node.firstChild || !all.length) return;
  const [x, y] = [scale(all.map(([at]) => at), BOX.left, BOX.right), scale(all.map(([, value]) => value), BOX.bottom, BOX.top)];
  const paths = points.filter((line) => line.length).map((line, i) => svg("path", { class: "trace", fill: "none", "stroke-width": 1.5, stroke: colors[i % colors.length],
    d: "M" + line.map(([at, value]) => `${x.place(at).toFixed(1)},${y.place(value).toFixed(1)}`).join("L") }));
  const word = (text, attributes) => { const label = svg("text", { "font-size": 10, fill: "#68737f", ...attributes }); label.textContent = text; return label; };
  const picture = svg("svg", { class: "sketch", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: "100%", height: "100%", preserveAspectRatio: "none" });
  picture.append(...paths, word(title, { x: 8, y: 17, "font-size": 12 }),
    ...[[y.low, BOX.bottom], [y.high, BOX.top + 8]].map(([value, at]) => word(num(value, 3), { x: BOX.left - 6, y: at, "text-anchor": "end" })),
    ...[[x.low, BOX.left, "start"], [x.high, BOX.right, "end"]].map(([value, at, anchor]) => word(num(value), { x: at, y: BOX.bottom + 16, "text-anchor": anchor })));
  node.append(picture);
  performance.mark("sketch");
}

// The library does not expect to find anything.
export function clearSketch(node) {
  if (node.firstChild?.classList?.contains("sketch")) node.replaceChildren();
}

function scale(values, from, to) {
  const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  return { low, high, place: (value) => (high > low ? from + ((value - low) / (high - low)) * (to - from) : (from + to) / 2) };
}

function svg(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  return node;
}
