// The dashboard: asks for what was spent, what is in force and the newest requests, and shows it.

import { gap, histogram, stacks, tradeoff } from "./charts.js";
import { find, html, svg, table } from "./dom.js";
import { count, exact, milliseconds, money, moneyTick, percent, score, slotName, slotTitle, time, unbroken } from "./format.js";

const WHY = {
  pinned: "The request named its target",
  signal: "Its mode is in the tier's table",
  step: "A step rule: how the last tool ended",
  default: "No mode: the tier's default",
  predicted: "Its score against the threshold",
  unknown: "Unlike the training data",
  budget: "The budget's pace",
  sticky: "Its session's prompt cache is warm",
  capability: "The first choice could not take it",
  fallback: "The first choice failed",
  escalated: "The first answer was faulty",
};
const THEMES = ["auto", "light", "dark"];
const NONE = "(none)";

const shown = { spend: null, routing: null, requests: [] };
const asked = {};  // what is under way, by part

class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function get(what, parameters, signal) {
  const answer = await fetch(`/dashboard/${what}?${new URLSearchParams(parameters)}`, { signal, headers: { accept: "application/json" } });
  if (answer.status === 401) {
    location.assign("/dashboard/login");
    throw new Problem("Signed out.", 401);
  }
  const body = await answer.json();
  if (!answer.ok) throw new Problem(body.error.message, answer.status);
  return body;
}

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const named = (value) => (value === null ? NONE : value);
// Ids of sessions are long, and their beginnings tell them apart.
const short = (text) => text.replace(/\b([0-9a-f]{8})[0-9a-f]{16,}\b/g, "$1…");

// --- Asking ------------------------------------------------------------------------------------------------------

async function load(parts = ["spend", "routing", "requests", "budgets"]) {
  const [range, by] = [chosen("range"), chosen("by")];
  history.replaceState(null, "", `?range=${range}&by=${by}`);
  find("csv").href = `/dashboard/spend.csv?range=${range}&by=${by}`;
  const main = find("main");
  main.setAttribute("aria-busy", "true");
  const show = {
    spend: (found) => { shown.spend = found; showSpend(); },
    routing: (found) => { shown.routing = found; showRouting(); },
    requests: (found) => { shown.requests = []; showRequests(found); },
    budgets: showBudgets,
  };
  const ends = await Promise.allSettled(parts.map(async (part) => {
    asked[part]?.abort();
    asked[part] = new AbortController();
    show[part](await get(part, { range, by }, asked[part].signal));
  }));
  if (ends.some((end) => end.reason?.name === "AbortError")) return;  // a newer one is under way
  main.removeAttribute("aria-busy");
  const problems = ends.map((end) => end.reason).filter((reason) => reason && reason.status !== 401);
  const noLedger = problems.some((problem) => problem.status === 404);
  if (document.body.classList.contains("no-ledger") !== noLedger) {
    document.body.classList.toggle("no-ledger", noLedger);
    redraw();  // what is left has another width
  }
  notice(noLedger ? null : problems[0] ?? null, noLedger);
}

function notice(problem, noLedger) {
  const place = find("notice");
  place.hidden = !problem && !noLedger;
  if (noLedger) {
    place.replaceChildren(
      html("h1", {}, "This server keeps no ledger yet"),
      html("p", {}, "Start it with ", html("code", {}, "router serve --ledger default"), " or set ", html("code", {}, "ROUTER_LEDGER"),
        ", give every target of the policy its prices, and each request is counted from then on: what it cost, what it was for, and why it went where it went."),
    );
  } else if (problem) {
    place.replaceChildren(html("p", {}, problem instanceof Problem ? problem.message : "The server cannot be reached."));
  }
}

// --- What was spent ----------------------------------------------------------------------------------------------

function showSpend() {
  const { spend } = shown;
  const summary = unbroken(short(spend.summary));
  const cut = summary.lastIndexOf(": ");
  find("answer").textContent = cut < 0 ? summary : `${summary.slice(0, cut)}.`;
  const sizes = cut < 0 ? "" : summary.slice(cut + 2);
  find("sizes").textContent = `${sizes.charAt(0).toUpperCase()}${sizes.slice(1)}`;
  const all = spend.total;
  const strongest = all.cost_usd + all.saved_usd_estimate;
  find("tiles").replaceChildren(
    tile("Spent", money(all.cost_usd), all.requests ? `${money((1000 * all.cost_usd) / all.requests)} per 1,000 requests` : "nothing yet"),
    tile("Saved (est.)", money(all.saved_usd_estimate), strongest > 0 ? `${percent(all.saved_usd_estimate / strongest)} less than always the strongest` : "beside always the strongest", all.saved_usd_estimate > 0 ? "good" : ""),
    tile("Requests", count(all.requests), all.failed ? `${exact(all.failed)} failed` : "none failed", all.failed / all.requests > 0.05 ? "bad" : ""),
    tile("Tokens", count(all.tokens), `${percent(all.cache_share)} of the input from caches`),
  );
  showOverTime();
  showGroups();
  showSaving();
}

const tile = (name, value, note, mood = "") =>
  html("div", { class: "tile" }, html("dt", {}, name), html("dd", { class: `value ${mood}` }, value), html("dd", { class: "muted small" }, note));

function empty(figure) {
  find(figure).replaceChildren(html("p", { class: "empty muted" }, "No requests in this time."));
}

function slots() {
  const { slot, slots: starts } = shown.spend.period;
  return { slots: starts.map((one) => slotName(one, slot)), titles: starts.map((one) => slotTitle(one, slot)), every: slot };
}

function showOverTime() {
  const { spend } = shown;
  if (!spend.total.requests) return empty("over-time");
  const unit = spend.total.cost_nano_usd ? "usd" : "tokens";
  const words = unit === "usd" ? money : count;
  const groups = spend.drawn.map((group, index) => ({ name: short(named(group.value)), values: group[unit], color: `c${index + 1}` }));
  const rest = spend.series[unit].map((all, slot) => Math.max(all - groups.reduce((sum, group) => sum + group.values[slot], 0), 0));
  if (spend.groups_total > groups.length) groups.push({ name: "others", values: rest, color: "c0" });
  const { slots: names, titles, every } = slots();
  const what = unit === "usd" ? "Dollars" : "Tokens";
  stacks(find("over-time"), {
    label: `${what} by ${every} and ${spend.by}`, slots: names, titles, groups, words,
    tick: unit === "usd" ? moneyTick : count, rest: `${what} by ${every}, UTC`,
  });
}

function showGroups() {
  const { spend } = shown;
  const paid = spend.total.cost_usd;
  const row = (name, group, color, italic) => [
    html("span", { class: "name" }, html("span", { class: `key ${color}` }), html(italic ? "i" : "span", { title: name }, short(name))),
    html("span", { class: "meter", share: group.tokens_share }, percent(group.tokens_share)),
    count(group.tokens),
    html("span", { class: "meter", share: paid ? group.cost_usd / paid : 0 }, paid ? percent(group.cost_usd / paid) : "–"),
    group.requests && group.unpriced_requests === group.requests ? "no price" : money(group.cost_usd),
    count(group.requests),
    percent(group.cache_share),
    money(group.saved_usd_estimate),
  ];
  const rows = spend.groups.map((group, index) =>
    row(named(group[spend.by]), group, index < spend.drawn.length ? `c${index + 1}` : "c0", group[spend.by] === null));
  const more = spend.groups_total - spend.groups.length;
  if (more > 0) rows.push(row(`${exact(more)} more`, spend.others, "c0", true));
  find("groups").replaceChildren(rows.length
    ? table(`Spend by ${spend.by}, most tokens first`, [spend.by, "of tokens", "tokens", "of dollars", "dollars", "requests", "cached", "saved (est.)"], rows, { numbers: [2, 4, 5, 6, 7], classes: "groups" })
    : "");
  const notes = [];
  const { usage_estimated_requests: estimated, unpriced_requests: unpriced, earlier_tokens: earlier } = spend.total;
  if (spend.total.saved_usd_estimate) notes.push("Saved is an estimate: the same tokens at the strongest target's prices.");
  if (estimated) notes.push(`${exact(estimated)} requests came without usage: their tokens are estimates.`);
  if (unpriced) notes.push(`${exact(unpriced)} requests went to targets without prices: not in the dollars.`);
  if (earlier) notes.push(`${count(earlier)} tokens went to attempts that did not give the answer.`);
  find("groups-note").textContent = notes.join(" ");
}

function showSaving() {
  const { spend } = shown;
  if (!spend.total.requests) return empty("saving");
  const running = (values) => { let sum = 0; return values.map((value) => (sum += value)); };
  const lower = running(spend.series.usd);
  const saved = running(spend.series.saved_usd);
  const { slots: names, titles } = slots();
  gap(find("saving"), {
    label: "Dollars so far, paid and at the strongest target", slots: names, titles, lower,
    upper: lower.map((paid, slot) => paid + saved[slot]), names: ["paid", "always the strongest (est.)"], words: money, tick: moneyTick,
    rest: `${money(saved.at(-1))} saved so far (est.): the same tokens at the strongest target's prices`,
  });
}

function showBudgets({ budgets, at_limit: atLimit }) {
  find("budgets-card").hidden = !budgets.length;
  const state = (one) => {
    if (one.remaining <= 0) return [atLimit === "refuse" ? "used up: requests are refused" : "used up: everything goes to the cheapest target", "bad"];
    const paced = one.threshold === null ? "" : `; the threshold is raised to ${score(one.threshold)}`;
    return one.pace > 1 ? [`${percent(one.pace)} of it at this pace${paced}`, "bad"] : [`lasts at this pace${paced}`, "muted"];
  };
  find("budgets").replaceChildren(table("Budgets of the current month and day", ["budget", "spent", "dollars", "outlook", "begins anew"], budgets.map((one) => {
    const [words, mood] = state(one);
    const name = one.name === null ? one.scope : `${one.scope} ${short(one.name)}`;
    const share = one.amount ? one.spent / one.amount : 1;
    return [
      html("span", {}, html("b", {}, name), ` · ${one.period}`), html("span", { class: `meter ${share >= 1 ? "full" : ""}`, share: Math.min(share, 1) }, percent(share)),
      `${money(one.spent)} of ${money(one.amount)}${one.reserved ? `, ${money(one.reserved)} held` : ""}`, html("span", { class: mood }, words), time(one.resets_at),
    ];
  }), { classes: "budgets" }));
}

// --- What is decided, and by what --------------------------------------------------------------------------------

function showRouting() {
  const { routing } = shown;
  if (routing.reasons) {
    find("reasons").replaceChildren(routing.reasons.length
      ? table("Requests by reason", ["reason", "of requests", "requests", "dollars"], routing.reasons.map((one) => [
        html("span", { class: "why" }, html("b", {}, named(one.reason)), html("span", { class: "muted small" }, WHY[one.reason] ?? "")),
        html("span", { class: "meter", share: one.share }, percent(one.share)), count(one.requests), money(one.usd),
      ]), { numbers: [2, 3], classes: "reasons" })
      : html("p", { class: "empty muted" }, "No requests in this time."));
    showScores();
  }
  showCurve();
  find("logout").hidden = !routing.login;
  find("about").replaceChildren(`Policy ${routing.policy}`, routing.bundle ? ` · bundle ${routing.bundle}` : " · no bundle", " · times are UTC");
}

function showScores() {
  const { scores, thresholds, bundle } = shown.routing;
  const threshold = thresholds[0]?.threshold ?? null;
  if (!scores.bins.length) {
    const reason = !scores.requests ? "No requests in this time." : bundle ? `None of the ${exact(scores.requests)} newest requests in this time was scored by ${bundle}.` : "This policy predicts nothing: no request has a score.";
    find("scores").replaceChildren(html("p", { class: "empty muted" }, reason));
    return;
  }
  const over = scores.bins.filter((bin) => threshold !== null && bin.from >= threshold - 1e-9).reduce((sum, bin) => sum + bin.count, 0);
  const rows = `${exact(scores.scored)} scored requests${scores.complete ? "" : ` among the newest ${exact(scores.requests)}`}`;
  histogram(find("scores"), {
    label: "Requests by score", bins: scores.bins, width: scores.width, threshold, words: exact,
    rest: threshold === null ? rows : `${percent(over / scores.scored)} of ${rows} lie over the threshold: those go to the stronger target`,
  });
}

function showCurve() {
  const { curve, thresholds, bundle } = shown.routing;
  if (!curve) {
    find("curve").replaceChildren(html("p", { class: "empty muted" }, bundle
      ? `The bundle ${bundle} carries no curve. Bundles that router-train fit writes now do: train it again to see the cost and quality of every threshold.`
      : "The policy predicts nothing, so no bundle is loaded."));
    return;
  }
  const axis = curve.axis === "strong_share" ? "to the strong target" : "of the dearest target's cost";
  const told = thresholds.filter((one) => one.point);
  const points = told.filter((one, index) => told.findIndex((other) => other.threshold === one.threshold) === index).map((one) => ({
    ...one.point, default: one.default,
    name: thresholds.length > 1 ? told.filter((other) => other.threshold === one.threshold).map((other) => other.tier).join(", ") : "in force",
  })).reverse();  // the default tier's is drawn last
  const mine = points.at(-1);
  const best = Math.max(...Object.values(curve.alone).map(([, quality]) => quality));
  tradeoff(find("curve"), {
    label: `Quality by share ${axis}`, curve, points, axis, words: percent,
    rest: mine ? `In force: ${percent(mine.quality / best)} of the best quality with ${percent(mine.spend)} ${axis} (${exact(curve.rows)} held-out rows)` : `Measured on ${exact(curve.rows)} held-out rows`,
  });
}



// --- Single requests ---------------------------------------------------------------------------------------------

function showRequests(found) {
  shown.requests.push(...found.requests);
  const place = find("requests");
  const first = shown.requests.length === found.requests.length;
  if (first) place.replaceChildren(html("table", { class: "requests", role: "table" },
    html("caption", { class: "hidden" }, "The newest requests, each with its decision"),
    html("thead", { role: "rowgroup" }, html("tr", { role: "row" }, ["Time", "Target", "Why", "Tokens", "Dollars", "Details"].map((name, index) =>
      html("th", { scope: "col", role: "columnheader", class: index === 3 || index === 4 ? "number" : null }, index === 5 ? html("span", { class: "hidden" }, name) : name)))),
    html("tbody", { role: "rowgroup" })));
  if (!shown.requests.length) place.replaceChildren(html("p", { class: "empty muted" }, "No requests in this time."));
  place.querySelector("tbody")?.append(...found.requests.flatMap(requestRows));
  const button = find("older");
  button.hidden = !found.next;
  button.dataset.before = found.next ?? "";
}

function why(request) {
  if (request.reason === "predicted" && request.score !== null) {
    if (request.threshold === null) return `score ${score(request.score)}, by quality per dollar`;
    return `score ${score(request.score)} is ${request.score > request.threshold ? "over" : "not over"} ${score(request.threshold)}`;
  }
  if (request.reason === "signal" && request.mode) return `mode ${request.mode}`;
  return WHY[request.reason] ?? "";
}

let rowsMade = 0;

function requestRows(request) {
  const id = `details-${(rowsMade += 1)}`;
  const cell = (name, ...children) => html("td", { role: "cell", class: name }, ...children);
  const tokens = request.input_tokens + request.output_tokens;
  const bad = request.status >= 400;
  const details = html("tr", { id, class: "details", role: "row", hidden: true });
  const toggle = html("button", {
    type: "button", "aria-expanded": "false", "aria-controls": id, "aria-label": `Details of the request at ${time(request.time)}`,
    on: {
      click: () => {
        if (!details.firstChild) details.append(html("td", { role: "cell", colspan: 6 }, facts(request)));
        details.hidden = !details.hidden;
        toggle.setAttribute("aria-expanded", String(!details.hidden));
      },
    },
  }, svg("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, svg("path", { d: "M6 8l4 4 4-4" })));
  return [
    html("tr", { role: "row", class: bad ? "bad" : null },
      html("th", { scope: "row", role: "rowheader", class: "when" }, time(request.time)),
      cell("target", html("span", {}, request.target ?? "–"), bad ? html("span", { class: "chip bad" }, request.error ?? String(request.status)) : null),
      cell("why", html("span", { class: "chip" }, request.reason ?? "–"), html("span", { class: "muted" }, why(request))),
      cell("number tokens", `${request.usage_estimated ? "≈ " : ""}${count(tokens)}`),
      cell("number dollars", money(request.cost_usd)),
      cell("more", toggle)),
    details,
  ];
}

function facts(request) {
  const rows = [
    ["Request", request.request],
    ["Mode", request.mode],
    ["Feature", request.feature],
    ["Tier", request.tier],
    ["Key", request.client],
    ["Session", request.session],
    ["Model", request.model],
    ["Dialect", request.dialect],
    ["Score", request.score === null ? null : `${score(request.score)}${request.threshold === null ? "" : ` against ${score(request.threshold)}`}`],
    ["Input", `${exact(request.input_tokens)} tokens, ${exact(request.cached_read_tokens)} from a cache, ${exact(request.cache_write_tokens)} written to one`],
    ["Output", `${exact(request.output_tokens)} tokens${request.reasoning_tokens ? `, ${exact(request.reasoning_tokens)} of them reasoning` : ""}`],
    ["Earlier attempts", request.earlier_tokens || request.fallbacks ? `${exact(request.fallbacks)} targets, ${exact(request.earlier_tokens)} tokens, ${money(request.earlier_cost_usd)}` : null],
    ["At the strongest", request.strongest === null ? null : `${money(request.strongest_cost_usd)} (${request.strongest}, est.)`],
    ["Took", `${milliseconds(request.latency_ms)}${request.first_token_ms === null ? "" : `, first token after ${milliseconds(request.first_token_ms)}`}, decided in ${milliseconds(request.decision_ms)}`],
    ["Status", `${request.status}${request.error ? ` ${request.error}` : ""}${request.streamed ? ", streamed" : ""}${request.cancelled ? ", the client left" : ""}`],
    ["Bundle", request.bundle],
    ["Policy", request.policy],
  ];
  return html("dl", { class: "facts" }, rows.filter(([, value]) => value !== null && value !== "").map(([name, value]) =>
    html("div", {}, html("dt", {}, name), html("dd", {}, value))));
}

async function older() {
  const button = find("older");
  button.disabled = true;
  try {
    showRequests(await get("requests", { range: chosen("range"), before: button.dataset.before }, asked.requests.signal));
  } catch (problem) {
    if (problem.name !== "AbortError") notice(problem, false);
  } finally {
    button.disabled = false;
  }
}

// --- The page itself ---------------------------------------------------------------------------------------------

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const words = `Theme: ${theme === "auto" ? "as the system's" : theme}`;
  find("theme").setAttribute("aria-label", words);
  find("theme").title = words;
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % THEMES.length];
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Storage may be off: it counts until the page is left.
  }
  showTheme();
}

function redraw() {
  if (shown.spend) {
    showOverTime();
    showSaving();
  }
  if (shown.routing?.scores) showScores();
  if (shown.routing) showCurve();
}

function start() {
  const wanted = new URLSearchParams(location.search);
  for (const [name, usual] of [["range", "7d"], ["by", "mode"]]) {
    const inputs = [...document.querySelectorAll(`input[name="${name}"]`)];
    (inputs.find((input) => input.value === wanted.get(name)) ?? inputs.find((input) => input.value === usual)).checked = true;
  }
  find("range").addEventListener("change", () => load());
  find("by").addEventListener("change", () => load(["spend"]));
  find("refresh").addEventListener("click", () => load());
  find("older").addEventListener("click", older);
  find("theme").addEventListener("click", nextTheme);
  showTheme();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    requestAnimationFrame(redraw);
  });
  load();
}

start();
