// Example images as buttons; a click tells the server which. Run by gr.HTML once, with `element`, `trigger`.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-number]");
  if (button) trigger("click", { number: Number(button.dataset.number) });
});
