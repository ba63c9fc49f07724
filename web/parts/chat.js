// The conversation. Run by gr.HTML once, with `element`, `props`, `watch`. Questions and answers are somebody else's text:
// they become text nodes, never HTML, and mask tokens such as <ins> stay readable.
const list = element.querySelector(".chat");
const show = (messages) => {
  if (!messages || !messages.length) {
    list.replaceChildren(Object.assign(document.createElement("p"), { className: "empty", textContent: "Answers appear here." }));
    return;
  }
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  list.replaceChildren(...messages.map(({ role, text }) => {
    const line = Object.assign(document.createElement("p"), { className: role });
    for (const piece of text.split(/(?<=>)/)) line.append(piece, document.createElement("wbr"));  // a line may end after a token
    return line;
  }));
  if (atEnd || messages[messages.length - 1].role !== "answer") list.scrollTop = list.scrollHeight;
};
watch("value", () => show(props.value));
show(props.value);
