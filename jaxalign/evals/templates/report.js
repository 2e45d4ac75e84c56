"use strict";
const buttons = document.querySelectorAll("[data-show]");
const items = document.querySelectorAll("[data-status]");
function show(wanted) {
  let seen = 0;
  for (const item of items) {
    item.hidden = wanted !== "all" && item.dataset.status !== wanted;
    seen += !item.hidden;
  }
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.show === wanted));
  document.getElementById("no-items").hidden = seen > 0;
}
for (const button of buttons) button.addEventListener("click", () => show(button.dataset.show));
