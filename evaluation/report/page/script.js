const choice = document.getElementById("suite");

function show(name) {
  let shown = 0;
  for (const part of document.querySelectorAll("[data-suite]")) {
    const fits = !name || part.dataset.suite === name || part.dataset.group === name.replace(/^group:/, "");
    part.hidden = !fits;
    if (fits && part.matches("section")) shown += 1;
  }
  choice.value = name;
  document.getElementById("shown").textContent =
    `${shown} of ${document.querySelectorAll("section[data-suite]").length} suites`;
}

function fromAddress() {
  const name = decodeURIComponent(location.hash.slice(1));
  show([...choice.options].some((option) => option.value === name) ? name : "");
}

choice.onchange = () => { location.hash = encodeURIComponent(choice.value); };
window.onhashchange = fromAddress;
for (const button of document.querySelectorAll("button[data-sort]")) {
  button.onclick = () => {
    const list = button.closest(".card").querySelector(".classes");
    const key = button.dataset.sort === "iou" ? "iou" : "place";
    const sign = key === "iou" ? -1 : 1;
    [...list.children].sort((a, b) => sign * (a.dataset[key] - b.dataset[key])).forEach((row) => list.append(row));
    button.dataset.sort = key === "iou" ? "place" : "iou";
    button.textContent = key === "iou" ? "in the list's order" : "best first";
  };
}
fromAddress();
