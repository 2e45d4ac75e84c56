"use strict";
const search = document.getElementById("search");
const choices = document.querySelectorAll("[data-by]");
const records = Array.from(document.querySelectorAll("article"), (node) => [node, node.textContent.toLowerCase()]);
function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let seen = 0;
  for (const [node, text] of records) {
    const chosen = Array.from(choices).every((c) => c.value === "*" || c.value === "=" + node.dataset[c.dataset.by]);
    node.hidden = !(chosen && words.every((word) => text.includes(word)));
    seen += !node.hidden;
  }
  document.getElementById("count").textContent = `${seen} shown`;
  document.getElementById("no-items").hidden = seen > 0;
}
search.addEventListener("input", show);
for (const choice of choices) choice.addEventListener("change", show);
show();  // a browser may have kept what was typed before
