// The conversation. Run by gr.HTML once, with `element`, `props`, `watch`. Questions and answers are somebody else's text:
// they become text nodes, never HTML, and mask tokens such as <ins> stay readable.
const list = element.querySelector(".chat");
const show = (messages) => {
  if (!messages || !messages.length) {
    list.replaceChildren(Object.assign(document.createElement("p"), { className: "empty", textContent: "Answers appear here." }));
    return;
  }
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  // Only lines that changed are replaced: a screen reader reads out what is new in the log, and a selection elsewhere stays.
  const lines = [...list.children];
  messages.forEach(({ role, text }, place) => {
    const old = lines[place];
    if (old && old.className === role && old.dataset.text === text) return;
    const line = Object.assign(document.createElement("p"), { className: role });
    line.dataset.text = text;
    for (const piece of text.split(/(?<=>)/)) line.append(piece, document.createElement("wbr"));  // a line may end after a token
    if (old) old.replaceWith(line);
    else list.append(line);
  });
  lines.slice(messages.length).forEach((line) => line.remove());
  if (atEnd || messages[messages.length - 1].role !== "answer") list.scrollTop = list.scrollHeight;
};
watch("value", () => show(props.value));
show(props.value);
