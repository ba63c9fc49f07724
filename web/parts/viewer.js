// The image with its masks: shown, hidden, hovered, at any opacity. Run by gr.HTML once, with `element`, `props`, `watch`.
// Names and answers are somebody else's text: they become text nodes, never HTML.
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};
const root = element.querySelector(".viewer");
const state = { opacity: 0.5, answer: null, hidden: new Map(), count: 0 };  // hidden: numbers of masks, by answer
const percent = (share) => (share > 0 && share < 0.001 ? "under 0.1" : (100 * share).toFixed(1)) + " %";
const facts = (mask) => `score ${mask.score.toFixed(2)} · ${mask.area.toLocaleString("en")} px (${percent(mask.share)})`;
const title = (mask) => (mask.name || "mask") + (mask.instead ? " (what is there instead)" : "");

const load = (source) => new Promise((done, failed) => {
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = failed;
  image.src = source;
});

// The alpha of each pixel of a mask: 255 inside, and which pixels are its outline.
const read = (image, width, height) => {
  const canvas = make("canvas", { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, width, height);
  const pixels = pen.getImageData(0, 0, width, height).data;
  const inside = new Uint8Array(width * height);
  for (let i = 0; i < inside.length; i++) inside[i] = pixels[4 * i] > 127 ? 1 : 0;
  return inside;
};

const layer = (inside, colour, width, height, thick) => {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const paint = (test) => {
    const canvas = make("canvas", { width, height });
    const pen = canvas.getContext("2d");
    const data = pen.createImageData(width, height);
    for (let i = 0; i < inside.length; i++) {
      if (inside[i] && test(i)) data.data.set([red, green, blue, 255], 4 * i);
    }
    pen.putImageData(data, 0, 0);
    return canvas;
  };
  const edge = (i) => {
    const x = i % width, y = (i - x) / width;
    for (let step = 1; step <= thick; step++) {
      if (x >= step && !inside[i - step]) return true;
      if (x + step < width && !inside[i + step]) return true;
      if (y >= step && !inside[i - step * width]) return true;
      if (y + step < height && !inside[i + step * width]) return true;
    }
    return false;
  };
  return { fill: paint(() => true), line: paint(edge) };
};

const show = async (value) => {
  const ticket = ++state.count;
  if (!value || !value.image) {
    root.replaceChildren(make("p", { className: "empty" }, "Upload an image, or choose an example."));
    state.hidden.clear();
    return;
  }
  const image = await load(value.image);
  const answers = value.answers;
  const last = answers[answers.length - 1];
  for (const answer of answers) {
    answer.images = await Promise.all(answer.masks.map((mask) => load(mask.png)));
  }
  if (ticket !== state.count) return;  // a newer value came meanwhile
  if (!answers.length) state.hidden.clear();
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const thick = Math.max(1, Math.round(Math.max(width, height) / 500));
  const canvas = make("canvas", { width, height, tabIndex: 0, role: "img" });
  canvas.dataset.answers = answers.length;
  canvas.style.width = `min(100%, calc(60vh * ${width / height}))`;
  canvas.setAttribute("aria-label", `the image ${value.name} with its masks`);
  const tip = make("div", { className: "tip", hidden: true });
  const panel = make("div", { className: "panel" });
  root.replaceChildren(make("div", { className: "stage" }, canvas, tip), panel);

  let layers = [];
  let hidden = new Set();
  let pointed = new Set();
  const draw = () => {
    const pen = canvas.getContext("2d");
    pen.globalAlpha = 1;
    pen.drawImage(image, 0, 0);
    layers.forEach((one, number) => {
      if (hidden.has(number)) return;
      pen.globalAlpha = pointed.has(number) ? Math.min(1, state.opacity + 0.25) : state.opacity;
      if (pointed.size && !pointed.has(number)) pen.globalAlpha *= 0.4;
      pen.drawImage(one.fill, 0, 0);
      pen.globalAlpha = pointed.size && !pointed.has(number) ? 0.4 : 1;
      pen.drawImage(one.line, 0, 0);
    });
    canvas.dataset.shown = layers.map((_, number) => number).filter((number) => !hidden.has(number)).join(",");
    canvas.dataset.pointed = [...pointed].join(",");
  };

  const choose = (answer) => {
    state.answer = answer.number;
    layers = answer.masks.map((mask, number) => {
      const inside = read(answer.images[number], width, height);
      return { mask, inside, ...layer(inside, mask.colour, width, height, thick) };
    });
    if (!state.hidden.has(answer.number)) state.hidden.set(answer.number, new Set());
    hidden = state.hidden.get(answer.number);
    pointed = new Set();
    const rows = answer.masks.map((mask, number) => {
      const box = make("input", { type: "checkbox", checked: !hidden.has(number) });
      box.onchange = () => { box.checked ? hidden.delete(number) : hidden.add(number); draw(); };
      const swatch = make("i");
      swatch.style.background = mask.colour;
      const words = make("span", {}, make("b", {}, title(mask)), make("small", {}, facts(mask)));
      const row = make("label", { className: "mask" }, box, swatch, words);
      row.onmouseenter = () => { if (!hidden.has(number)) { pointed = new Set([number]); draw(); } };
      row.onmouseleave = () => { pointed = new Set(); draw(); };
      return make("li", {}, row);
    });
    const gone = (name, why) => make("li", { className: "absent" }, make("s", {}, name), make("small", {}, why));
    rows.push(...answer.absent.map((name) => gone(name, "not in the image")));
    rows.push(...answer.unmentioned.map((name) => gone(name, "not mentioned in the answer")));
    const all = (off) => () => {
      answer.masks.forEach((_, number) => (off ? hidden.add(number) : hidden.delete(number)));
      list.querySelectorAll("input").forEach((box) => (box.checked = !off));
      draw();
    };
    const list = make("ul", {}, ...rows);
    const slider = make("input", { type: "range", min: 0, max: 100, value: 100 * state.opacity });
    slider.oninput = () => { state.opacity = slider.value / 100; draw(); };
    const tools = [make("label", { className: "opacity" }, "Opacity", slider)];
    if (layers.length > 1) {
      tools.push(make("button", { type: "button", onclick: all(false) }, "Show all"));
      tools.push(make("button", { type: "button", onclick: all(true) }, "Hide all"));
    }
    if (answers.length > 1) {
      const select = make("select", {}, ...answers.map((one) =>
        make("option", { value: one.number, selected: one === answer }, `${one.number}: ${one.asked.slice(0, 60)}`)));
      select.onchange = () => choose(answers.find((one) => String(one.number) === select.value));
      tools.push(make("label", { className: "which" }, "Answer", select));
    }
    const nothing = rows.length ? [] : [make("p", { className: "none" }, "There is no mask in this answer.")];
    panel.replaceChildren(make("div", { className: "tools" }, ...tools), ...nothing, list);
    draw();
  };

  const point = (event) => {
    const place = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - place.left) / place.width) * width);
    const y = Math.floor(((event.clientY - place.top) / place.height) * height);
    const hit = layers.map((_, number) => number)
      .filter((number) => !hidden.has(number) && layers[number].inside[y * width + x]);
    const before = [...pointed].join();
    pointed = new Set(hit);
    if ([...pointed].join() !== before) draw();
    tip.hidden = !hit.length;
    tip.replaceChildren(...hit.map((number) => {
      const mask = layers[number].mask;
      const swatch = make("i");
      swatch.style.background = mask.colour;
      return make("div", {}, swatch, make("b", {}, title(mask)), " ", make("small", {}, facts(mask)));
    }));
    if (hit.length) {  // beside the pointer, inside the image
      const left = event.clientX - place.left + 14, top = event.clientY - place.top + 14;
      tip.style.left = `${Math.max(0, Math.min(left, place.width - tip.offsetWidth))}px`;
      tip.style.top = `${top + tip.offsetHeight > place.height ? Math.max(0, top - tip.offsetHeight - 28) : top}px`;
    }
  };
  canvas.onpointermove = canvas.onpointerdown = point;
  canvas.onpointerleave = () => { pointed = new Set(); tip.hidden = true; draw(); };

  if (last) choose(last); else draw();
};

watch("value", () => show(props.value));
show(props.value);
