// Numbers and times as people read them; the same forms as `router spend` prints.

const grouped = new Intl.NumberFormat("en");
const fixed = (digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const dollars = [fixed(0), fixed(2), fixed(4), fixed(6)];

// Between a number and its sign, where no line must end.
const SPACE = "\u00a0";
export const unbroken = (text) => text.replace(/(?<=\d) (?=[%kMB](?!\w))/g, SPACE);

export function money(usd) {
  if (usd === null || usd === undefined) return "no price";
  const size = Math.abs(usd);
  const sign = usd < 0 ? "−" : "";
  if (size > 0 && size < 1e-6) return `${sign}<$0.000001`;
  const format = size >= 10_000 ? dollars[0] : size === 0 || size >= 1 ? dollars[1] : size >= 0.01 ? dollars[2] : dollars[3];
  return `${sign}$${format.format(size)}`;
}

// On an axis whose steps are round.
export const moneyTick = (usd) => money(usd).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");

export function count(number) {
  for (const [size, sign] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(number) >= Math.max(size, 10_000)) {
      const part = number / size;
      return `${Math.abs(part) >= 99.95 ? grouped.format(Math.round(part)) : Number(part.toPrecision(3))}${SPACE}${sign}`;
    }
  }
  return grouped.format(number);
}

export const exact = (number) => grouped.format(number);

export function percent(share) {
  if (share > 0 && share < 0.001) return `<0.1${SPACE}%`;
  if (share >= 0.995 && share < 1) return `>99${SPACE}%`;
  return `${(share * 100).toFixed(share >= 0.0995 || share === 0 ? 0 : 1)}${SPACE}%`;
}

export const score = (value) => (value === null ? "–" : value.toFixed(3).replace("-", "−"));

export function milliseconds(value) {
  if (value === null) return "–";
  return value >= 1000 ? `${(value / 1000).toFixed(value >= 10_000 ? 0 : 1)}${SPACE}s` : `${value >= 10 ? value.toFixed(0) : value.toFixed(1)}${SPACE}ms`;
}

// All times are UTC, as the ledger's days are.
const utc = (options) => new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", ...options });
const day = utc({ day: "numeric", month: "short" });
const hour = utc({ hour: "2-digit", minute: "2-digit" });
const moment = utc({ day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const slotName = (iso, slot) => (slot === "hour" ? hour : day).format(new Date(iso));
export const slotTitle = (iso, slot) => (slot === "hour" ? `${day.format(new Date(iso))} ${hour.format(new Date(iso))}` : day.format(new Date(iso)));
export const time = (iso) => moment.format(new Date(iso));
