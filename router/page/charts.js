// Charts in SVG: drawn to the width that there is, read with pointer or arrow keys, and each with its numbers as a table.

import { html, svg, table } from "./dom.js";
import { score } from "./format.js";

const LEFT = 52;
const RIGHT = 10;
const TOP = 10;
const BOTTOM = 24;

// The least round step of which at most so many fit into a length.
function stepOf(length, most) {
  const power = 10 ** Math.floor(Math.log10(length / most));
  return [1, 2, 2.5, 5, 10].find((one) => one * power * most >= length * 0.999) * power;
}

// Multiples of a step from at or below the lowest up to at or above the highest.
function steps(lowest, highest, step) {
  const first = Math.floor(lowest / step + 1e-9);
  return Array.from({ length: Math.ceil(highest / step - 1e-9) - first + 1 }, (_, index) => (first + index) * step);
}

const ticks = (highest) => (highest > 0 ? steps(0, highest, stepOf(highest, 4)) : [0, 1]);

class Chart {
  constructor(figure, { label, height = 220, left = LEFT }) {
    this.width = Math.max(figure.clientWidth, 240);
    this.height = height;
    this.left = left;
    this.right = this.width - RIGHT;
    this.top = TOP;
    this.bottom = height - BOTTOM;
    this.root = svg("svg", {
      viewBox: `0 0 ${this.width} ${height}`, width: this.width, height,
      role: "img", "aria-label": label, tabindex: "0", focusable: "true",
    });
  }

  add(name, attributes, ...children) {
    const node = svg(name, attributes, ...children);
    this.root.append(node);
    return node;
  }

  // Horizontal lines at these values, each with its words; gives value → y.
  rows(values, words) {
    const [low, high] = [values[0], values.at(-1)];
    const y = (value) => this.bottom - ((value - low) / (high - low || 1)) * (this.bottom - this.top);
    for (const value of values) {
      this.add("line", { class: value === 0 ? "axis" : "grid", x1: this.left, x2: this.right, y1: y(value), y2: y(value) });
      this.add("text", { class: "tick", x: this.left - 8, y: y(value) + 4, "text-anchor": "end" }, words(value));
    }
    return y;
  }

  // Words under the chart, as many as there is room for.
  columns(places, words, room = 56) {
    const every = Math.ceil(places.length / Math.max(1, Math.floor((this.right - this.left) / room)));
    places.forEach((place, index) => {
      if ((places.length - 1 - index) % every) return;
      const inside = Math.min(Math.max(place, this.left + 12), this.right - 14);
      this.add("text", { class: "tick", x: inside, y: this.height - 6, "text-anchor": "middle" }, words[index]);
    });
  }

  line(points, className) {
    this.add("path", { class: className, d: `M${points.map((point) => point.map((one) => one.toFixed(1)).join(" ")).join("L")}` });
  }

  // A readout of one place at a time: under the pointer, or moved along by the arrow keys.
  readable(places, say, rest, out) {
    const mark = this.add("line", { class: "mark", y1: this.top, y2: this.bottom, visibility: "hidden" });
    let at = places.length - 1;
    const show = (index) => {
      at = index;
      mark.setAttribute("x1", places[at]);
      mark.setAttribute("x2", places[at]);
      mark.setAttribute("visibility", "visible");
      out.textContent = say(at);
    };
    const hide = () => {
      mark.setAttribute("visibility", "hidden");
      out.textContent = rest;
    };
    out.textContent = rest;
    if (!places.length) return;
    this.root.addEventListener("pointermove", (event) => {
      const x = ((event.clientX - this.root.getBoundingClientRect().left) * this.width) / this.root.clientWidth;
      show(places.reduce((best, place, index) => (Math.abs(place - x) < Math.abs(places[best] - x) ? index : best), 0));
    });
    this.root.addEventListener("pointerleave", () => document.activeElement === this.root || hide());
    this.root.addEventListener("focus", () => this.root.matches(":focus-visible") && show(at));
    this.root.addEventListener("blur", hide);
    this.root.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: places.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(Math.min(Math.max(to, 0), places.length - 1));
    });
  }
}

// Puts a chart into its figure, with the readout above it and its numbers below, open if they were.
function compose(figure, chart, out, numbers, legend = null) {
  const open = figure.querySelector("details")?.open;
  figure.replaceChildren(
    out, chart.root, ...(legend ? [legend] : []),
    html("details", { class: "numbers", open }, html("summary", {}, "As a table"), html("div", { class: "scroll" }, numbers)),
  );
}

const readout = () => html("figcaption", { class: "readout", "aria-live": "polite" });

// Bars a slot, each a stack of groups: [{name, values, color}], the first at the bottom.
export function stacks(figure, { label, slots, titles, groups, words, tick, rest }) {
  const chart = new Chart(figure, { label, height: 230 });
  const totals = slots.map((_, slot) => groups.reduce((sum, group) => sum + group.values[slot], 0));
  const y = chart.rows(ticks(Math.max(...totals)), tick);
  const step = (chart.right - chart.left) / slots.length;
  const wide = Math.min(step * 0.72, 56);
  const places = slots.map((_, slot) => chart.left + step * (slot + 0.5));
  slots.forEach((_, slot) => {
    let sum = 0;
    for (const group of groups) {
      const value = group.values[slot];
      if (!(value > 0)) continue;
      const [low, high] = [y(sum), y(sum + value)];
      sum += value;
      chart.add("rect", { class: `fill ${group.color}`, x: places[slot] - wide / 2, width: wide, y: high, height: Math.max(low - high - (sum < totals[slot] ? 0.75 : 0), 0.5), rx: 1.5 });
    }
  });
  chart.columns(places, slots);
  const out = readout();
  chart.readable(places, (slot) => [
    `${titles[slot]}: ${words(totals[slot])}`,
    ...groups.filter((group) => group.values[slot] > 0).sort((a, b) => b.values[slot] - a.values[slot]).slice(0, 3)
      .map((group) => `${group.name} ${words(group.values[slot])}`),
  ].join(" · "), rest, out);
  compose(figure, chart, out, table(label, ["Time", ...groups.map((group) => group.name), "All"],
    slots.map((_, slot) => [titles[slot], ...groups.map((group) => words(group.values[slot])), words(totals[slot])]),
    { numbers: [...groups.keys(), groups.length].map((index) => index + 1) }));
}

// Two rising lines with the space between them filled: what was paid, and what the strongest would have cost.
export function gap(figure, { label, slots, titles, lower, upper, names, words, tick, rest }) {
  const chart = new Chart(figure, { label, height: 300 });
  const y = chart.rows(ticks(Math.max(...lower, ...upper)), tick);
  const step = (chart.right - chart.left) / Math.max(slots.length - 1, 1);
  const places = slots.map((_, slot) => chart.left + step * slot);
  const points = (values) => values.map((value, slot) => [places[slot], y(value)]);
  const path = [...points(upper), ...points(lower).reverse()].map((point) => point.join(" ")).join("L");
  chart.add("path", { class: "between", d: `M${path}Z` });
  chart.line(points(upper), "stroke dashed c0");
  chart.line(points(lower), "stroke c1");
  chart.columns(places, slots);
  const out = readout();
  const told = (slot) => `${titles[slot]}: ${words(lower[slot])} paid, ${words(upper[slot])} at the strongest (est.), ${words(upper[slot] - lower[slot])} saved`;
  chart.readable(places, told, rest, out);
  compose(figure, chart, out, table(label, ["Time", ...names, "Saved (est.)"],
    slots.map((_, slot) => [titles[slot], words(lower[slot]), words(upper[slot]), words(upper[slot] - lower[slot])]), { numbers: [1, 2, 3] }),
  html("p", { class: "legend" }, html("span", { class: "key c1" }), names[0], html("span", { class: "key line c0" }), names[1]));
}

// Bins of scores; those above the threshold in another colour.
export function histogram(figure, { label, bins, width, threshold, words, rest }) {
  const chart = new Chart(figure, { label, left: 44 });
  const y = chart.rows(ticks(Math.max(...bins.map((bin) => bin.count))), words);
  const low = Math.min(bins[0].from, threshold ?? Infinity);
  const high = Math.max(bins.at(-1).from + width, threshold ?? -Infinity);
  const x = (value) => chart.left + ((value - low) / (high - low)) * (chart.right - chart.left);
  const strong = (bin) => threshold !== null && bin.from >= threshold - 1e-9;
  const places = bins.map((bin) => x(bin.from + width / 2));
  for (const bin of bins) {
    chart.add("rect", { class: `fill ${strong(bin) ? "c2" : "c1"}`, x: x(bin.from) + 0.5, width: Math.max(x(bin.from + width) - x(bin.from) - 1, 1), y: y(bin.count), height: chart.bottom - y(bin.count), rx: 1.5 });
  }
  const marks = steps(low, high, stepOf(high - low, 6)).filter((value) => value >= low && value <= high);
  chart.columns(marks.map(x), marks.map((value) => Number(value.toFixed(3)).toString().replace("-", "−")), 44);
  if (threshold !== null) {
    const at = x(threshold);
    const after = at < (chart.left + chart.right) / 2;
    chart.add("line", { class: "threshold", x1: at, x2: at, y1: chart.top - 4, y2: chart.bottom });
    chart.add("text", { class: "note", x: at + (after ? 6 : -6), y: chart.top + 6, "text-anchor": after ? "start" : "end" }, `threshold ${score(threshold)}`);
  }
  const range = (bin) => `${score(bin.from)} to ${score(bin.from + width)}`;
  const out = readout();
  chart.readable(places, (index) => `${range(bins[index])}: ${words(bins[index].count)} requests${threshold === null ? "" : strong(bins[index]) ? ", over the threshold" : ", not over it"}`, rest, out);
  compose(figure, chart, out, table(label, ["Score", "Requests", "Side"],
    bins.map((bin) => [range(bin), words(bin.count), threshold === null ? "–" : strong(bin) ? "over" : "not over"]), { numbers: [1] }));
}

// The bundle's quality against what it spends, the line of chance, each target alone, and the points in force.
export function tradeoff(figure, { label, curve, points, axis, words, rest }) {
  const chart = new Chart(figure, { label, left: 44 });
  const alone = Object.entries(curve.alone);
  const all = [...curve.quality, ...alone.map(([, [, quality]]) => quality)];
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const step = stepOf(Math.max(most - least, 0.01), 4);
  const y = chart.rows(steps(least - step / 3, most, step), (value) => value.toFixed(2));  // with room for a name below
  const furthest = Math.max(1, ...curve.spend);
  const x = (value) => chart.left + (value / furthest) * (chart.right - chart.left);
  const marks = [0, 0.25, 0.5, 0.75, 1];
  chart.columns(marks.map(x), marks.map((value) => words(value)), 40);
  const ends = alone.map(([, end]) => end).sort((a, b) => a[0] - b[0]);
  chart.line([ends[0], ends.at(-1)].map(([spend, quality]) => [x(spend), y(quality)]), "stroke dashed c0");
  chart.line(curve.spend.map((spend, index) => [x(spend), y(curve.quality[index])]), "stroke c1");
  // Below the line of chance, however steep it is.
  const drop = 18 + (90 * (y(ends[0][1]) - y(ends.at(-1)[1]))) / Math.max(x(ends.at(-1)[0]) - x(ends[0][0]), 1);
  for (const [name, [spend, quality]] of alone) {
    const late = spend > furthest / 2;
    chart.add("circle", { class: "dot c0", cx: x(spend), cy: y(quality), r: 4 });
    chart.add("text", { class: "note", x: x(spend) + (late ? -8 : 8), y: Math.min(y(quality) + (late ? drop : 16), chart.bottom - 4), "text-anchor": late ? "end" : "start" }, `always ${name}`);
  }
  for (const point of points) {
    const late = point.spend > furthest / 2;
    chart.add("circle", { class: `dot ${point.default ? "c2" : "c3"}`, cx: x(point.spend), cy: y(point.quality), r: 6.5 });
    chart.add("text", { class: "note strong", x: x(point.spend) + (late ? -12 : -4), y: y(point.quality) - 12, "text-anchor": late ? "end" : "middle" }, point.name);
  }
  const out = readout();
  const told = (index) => `${words(curve.spend[index])} ${axis}: quality ${curve.quality[index].toFixed(3)}`;
  chart.readable(curve.spend.map(x), told, rest, out);
  compose(figure, chart, out, table(label, [axis, "Quality"],
    curve.spend.map((spend, index) => [words(spend), curve.quality[index].toFixed(3)]), { numbers: [1] }),
  html("p", { class: "legend" }, html("span", { class: "key line c1" }), "this bundle", html("span", { class: "key line c0" }), "by chance", html("span", { class: "key dot c2" }), "in force"));
}
