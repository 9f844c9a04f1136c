// Before the page is drawn, so that a chosen theme does not flash in.
"use strict";
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be off: the system's theme then.
}
