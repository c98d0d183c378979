const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const root = document.documentElement;

const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new ARRAYS[packed.type](await new Response(stream).arrayBuffer());
}

function make(tag, properties = {}, ...children) {
  const { role, label, pressed, style, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (role) element.setAttribute("role", role);
  if (label) element.setAttribute("aria-label", label);
  if (pressed !== undefined) element.setAttribute("aria-pressed", pressed);
  for (const [name, value] of Object.entries(style ?? {})) element.style.setProperty(name, value);
  element.append(...children);
  return element;
}

const emoji = (index) => data.symbols[index][0];
const className = (index) => data.symbols[index][1];
const classColour = (index) => data.symbols[index][2];
const quiet = new Set(data.quiet);
const called = (index) => `${emoji(index)} ${className(index)}`;
const plain = (x, digits = 1) => {
  const text = Math.abs(x).toFixed(digits);
  return x < 0 && Number(text) ? `−${text}` : text;
};
const digitsFor = (largest) => (largest < 0.95 ? 2 : 1);
const signed = (x, digits = 1) => (x >= 0 && Number(x.toFixed(digits)) ? "+" : "") + plain(x, digits);
const percent = (p) => (p > 0 && p < 0.01 ? "<1 %" : `${Math.round(100 * p)} %`);

function scaleColour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (data.scale.length - 1);
  const low = Math.min(Math.floor(at), data.scale.length - 2);
  return data.scale[low].map((a, i) => Math.round(a + (data.scale[low + 1][i] - a) * (at - low)));
}
const rgb = (colour, alpha = 1) => `rgb(${colour[0]} ${colour[1]} ${colour[2]} / ${alpha})`;
const ramp = `linear-gradient(90deg, ${data.scale.map((c) => rgb(c)).join(", ")})`;
const diverging = (share) =>
  `color-mix(in oklab, var(--${share < 0 ? "less" : "more"}) ${Math.round(100 * Math.min(1, Math.abs(share)))}%, var(--zero))`;

function bars(list, entries) {
  list.replaceChildren(
    ...entries.map(({ index, share, number }) =>
      make("li", {},
        make("span", { className: "emoji", textContent: emoji(index) }),
        make("span", { className: "name", textContent: className(index), title: className(index) }),
        make("span", { className: "number", textContent: number }),
        make("span", { className: "bar" }, make("i", { style: { width: `${100 * share}%` } })),
      ),
    ),
  );
}

/* The token's name: class token, register 1, or the place of a patch. */
function tokenName(layout, token) {
  const patch = token - layout.prefix.length;
  if (patch < 0) return layout.prefix[token];
  return `patch in row ${Math.floor(patch / layout.columns) + 1}, column ${(patch % layout.columns) + 1}`;
}

/* A grid of patches over the image: one button a patch, arrow keys move between them. */
function patchGrid(box, layout, { label, onPick, onHover, onLeave }) {
  const { rows, columns, prefix } = layout;
  const first = prefix.length;
  const photo = document.querySelector(".hero .photo");
  box.style.aspectRatio = photo.style.aspectRatio;
  box.style.setProperty("--columns", columns);
  const cells = Array.from({ length: rows * columns }, (_, patch) =>
    make("button", { className: "cell", type: "button", tabIndex: -1, role: "gridcell" }, make("span", { ariaHidden: "true" })),
  );
  const lines = Array.from({ length: rows }, (_, row) =>
    make("div", { role: "row", style: { display: "contents" } }, ...cells.slice(row * columns, (row + 1) * columns)),
  );
  const grid = make("div", { className: "cells", role: "grid", label,
    style: { "grid-template-columns": `repeat(${columns}, minmax(0, 1fr))`, "grid-template-rows": `repeat(${rows}, minmax(0, 1fr))` } }, ...lines);
  box.append(grid);
  const at = (event) => cells.indexOf(event.target.closest(".cell"));
  grid.addEventListener("click", (event) => at(event) >= 0 && onPick(first + at(event)));
  grid.addEventListener("pointermove", (event) => event.pointerType === "mouse" && at(event) >= 0 && onHover?.(first + at(event), event));
  grid.addEventListener("pointerleave", () => onLeave?.());
  grid.addEventListener("keydown", (event) => {
    const patch = at(event);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const next = event.key === "Home" ? 0 : event.key === "End" ? cells.length - 1 : patch + steps[event.key];
    if (!(next >= 0 && next < cells.length)) return;
    event.preventDefault();
    onPick(first + next);
    cells[next].focus();
  });
  const crowd = () => box.classList.toggle("crowded", box.clientWidth / columns < 11);
  new ResizeObserver(crowd).observe(box);
  function choose(token) {
    cells.forEach((cell, patch) => {
      cell.setAttribute("aria-selected", patch === token - first);
      cell.tabIndex = patch === Math.max(0, token - first) ? 0 : -1;
    });
  }
  return { cells, choose };
}

/* Chips for the tokens that are no patch. */
function tokenChips(box, layout, onPick) {
  const chips = layout.prefix.map((name, token) => make("button", { className: "chip", type: "button", textContent: name, pressed: false, onclick: () => onPick(token) }));
  box.append(...chips);
  return chips;
}

/* A table of layers by heads with a column of labels before and a row of labels above. */
function layerHeadTable(box, layers, heads, kind, cell, labels = []) {
  box.classList.add(kind);
  box.style.gridTemplateColumns = `minmax(1.9rem, max-content) repeat(${heads}, minmax(0, ${layers > 6 ? "4.6rem" : "8rem"}))`;
  box.style.setProperty("--heads", heads);
  box.append(make("span", { className: "corner", textContent: "block ↓", ariaHidden: "true" }));
  for (let head = 0; head < heads; head++) box.append(make("span", { className: "label", textContent: head, title: `head ${head}`, ariaHidden: "true" }));
  const cells = [];
  for (let layer = 0; layer < layers; layer++) {
    box.append(make("span", { className: "label", textContent: labels[layer] ?? layer, title: `block ${labels[layer] ?? layer}`, ariaHidden: "true" }));
    for (let head = 0; head < heads; head++) cells.push(cell(layer, head));
    box.append(...cells.slice(-heads));
  }
  return cells;
}

function showTip(text, event) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY > height + 24 ? event.clientY - height - 14 : event.clientY + 20}px`;
}
const hideTip = () => { $("tip").hidden = true; };

root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
$("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; };
