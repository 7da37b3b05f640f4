// Elements made of text nodes alone: what a model or an environment wrote is never parsed as HTML.

export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined).map(asNode));
  return node;
}

function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(String(child));
}

export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined).map(asNode));
}

// A number as people read it: 4 digits, "n/a" for what is missing.
export function num(value, digits = 4) {
  if (value === null || value === undefined || value === "") return "n/a";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

// Seconds since 1970 as UTC; a file may hold any number.
export function utc(seconds) {
  const at = new Date(seconds * 1000);
  return Number.isNaN(at.getTime()) ? num(seconds) : at.toISOString().slice(0, 19).replace("T", " ");
}

export function text(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// rows of objects; columns: [title, row => node or text, is a number?]
export function table(columns, rows, rowAttributes = () => ({})) {
  const head = el("tr", {}, columns.map(([title, , isNumber]) => el("th", { class: isNumber ? "number" : null }, title)));
  const body = rows.map((row) =>
    el("tr", rowAttributes(row), columns.map(([, cell, isNumber]) => el("td", { class: isNumber ? "number" : null }, cell(row)))));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, body)));
}

export function select(options, value, onchange, attributes = {}) {
  const node = el("select", { ...attributes, onchange: () => onchange(node.value) },
    options.map(([key, title]) => el("option", { value: key }, title)));
  node.value = value;
  return node;
}

export function link(parts, query, ...children) {
  return el("a", { href: hash(parts, query) }, ...children);
}

export function hash(parts, query = {}) {
  const words = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const tail = words.length ? "?" + new URLSearchParams(words) : "";
  return "#/" + parts.map((part) => encodeURIComponent(part)).join("/") + tail;
}
