// Elements are made one by one and text is only ever text: what clients chose cannot become markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handle] of Object.entries(value)) node.addEventListener(event, handle);
    else if (name === "share") node.style.setProperty("--share", value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const html = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
export const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
export const find = (id) => document.getElementById(id);

export function table(caption, heads, rows, { numbers = [], classes = "" } = {}) {
  const cell = (value, index, name, more = {}) =>
    html(name, { class: numbers.includes(index) ? "number" : null, ...more }, value);
  return html(
    "table",
    { class: classes },
    html("caption", { class: "hidden" }, caption),
    html("thead", {}, html("tr", {}, heads.map((head, index) => cell(head, index, "th", { scope: "col" })))),
    html("tbody", {}, rows.map((row) => html("tr", {}, row.map((value, index) =>
      index === 0 ? cell(value, index, "th", { scope: "row" }) : cell(value, index, "td"))))),
  );
}
