const [startLayer, startHead] = data.start;
const state = { layer: startLayer, head: startHead, window: 0, query: 0, key: 0, scores: false, cover: 0.7 };
let pointed = null, shown = null, place = placeOf(startLayer);
const mapOf = (layer) => (data.layers[layer].windows ? Math.min(state.window, data.layers[layer].windows - 1) : 0) * data.layers[layer].heads;
const total = Math.max(...data.layers.map((layer) => layer.heads));

const pick = (query, key = query) => { Object.assign(state, { query, key }); pointed = null; paint(); paintThumbs(); };
let asked = 0;
function point(query, key, event, text) {
  pointed = { query, key };
  if (text) showTip(text, event);
  if (!asked) asked = requestAnimationFrame(() => { asked = 0; paint(); });
}
const leave = () => { pointed = null; hideTip(); if (!asked) asked = requestAnimationFrame(() => { asked = 0; paint(); }); };
const valueAt = (query, key) => shown[state.scores ? "scores" : "shares"][query * data.layers[state.layer].tokens + key];
const out = board($("out"), { label: "Tokens attended to", onPick: pick, onLeave: leave,
  onPoint: (token, event) => point(token, token, event, `${place.names[token]}: gets ${spell(valueAt((pointed ?? state).query, token), state.scores)} of ${place.names[(pointed ?? state).query]}`) });
const into = board($("in"), { label: "Tokens that attend", onPick: pick, onLeave: leave,
  onPoint: (token, event) => point(token, token, event, `${place.names[token]}: gives ${spell(valueAt(token, (pointed ?? state).key), state.scores)} to ${place.names[(pointed ?? state).key]}`) });

/* Between which values colours run: of patterns from 0 to the largest share of a patch, of scores over the row. */
function ends(values) {
  let [low, high] = [Infinity, -Infinity];
  for (let token = 0; token < values.length; token++) {
    if (values[token] === -Infinity) continue;
    if (state.scores || place.at(token) || !place.frames) { low = Math.min(low, values[token]); high = Math.max(high, values[token]); }
  }
  return [state.scores && low < high ? low : 0, high > -Infinity ? high : 1];
}
document.querySelectorAll(".board .ramp i").forEach((bar) => { bar.style.background = ramp; });
function legend(box, low, high) {
  const ramps = box.closest(".board").querySelector(".ramp");
  ramps.querySelector("[data-end=low]").textContent = spell(low, state.scores);
  ramps.querySelector("[data-end=high]").textContent = spell(high, state.scores);
  ramps.querySelector(".unit").textContent = state.scores ? "score before the softmax" : "share of attention";
}
function paint() {
  if (!shown) return;
  const { tokens } = data.layers[state.layer];
  const { query, key } = pointed ?? state;
  const source = shown[state.scores ? "scores" : "shares"];
  const row = source.subarray(query * tokens, (query + 1) * tokens);
  const column = new Float32Array(tokens);
  for (let other = 0; other < tokens; other++) column[other] = source[other * tokens + key];
  for (const [each, box, values, chosen] of [[out, $("out"), row, query], [into, $("in"), column, key]]) {
    const [low, high] = ends(values);
    each.paint(values, low, high, chosen, state.cover, state.scores);
    legend(box, low, high);
  }
  $("out-title").textContent = `${place.names[query]} attends to`;
  $("in-title").textContent = `attends to ${place.names[key]}`;
  for (const [mark, side, at] of [["row", "height", query], ["column", "width", key]]) {
    $(mark).style[side] = `${100 / tokens}%`;
    $(mark).style.transform = `translate${side === "height" ? "Y" : "X"}(${100 * at}%)`;
  }
  if (!pointed) tell(row, column, query, key);
}
function tell(row, column, query, key) {
  const best = (values) => Array.from(values, (value, token) => [value, token]).filter(([value]) => value > -Infinity).sort((a, b) => b[0] - a[0]).slice(0, 3)
    .map(([value, token]) => `${place.names[token]} (${spell(value, state.scores)})`).join("; ");
  const { within } = data.layers[state.layer];
  const where = within ? `, ${within} ${state.window}` : "";
  $("words").textContent = `Layer ${data.layers[state.layer].label}, head ${state.head}${where}. ${place.names[query]} attends most to ${best(row)}. ${place.names[key]} gets most from ${best(column)}.`;
}

const matrix = $("matrix");
function paintMatrix() {
  const { tokens } = data.layers[state.layer];
  matrix.width = matrix.height = tokens;
  const ink = matrix.getContext("2d");
  const pixels = ink.createImageData(tokens, tokens);
  const source = shown[state.scores ? "scores" : "shares"];
  let [low, high] = [Infinity, -Infinity];
  for (const value of source) if (value > -Infinity) { low = Math.min(low, value); high = Math.max(high, value); }
  for (let query = 0; query < tokens; query++) {
    let most = 1e-12;
    for (let key = 0; key < tokens; key++) most = Math.max(most, source[query * tokens + key]);
    for (let key = 0; key < tokens; key++) {
      const value = source[query * tokens + key];
      const share = state.scores ? (value - low) / (high - low || 1) : Math.sqrt(value / most);
      const at = 4 * (query * tokens + key);
      const colour = value === -Infinity ? [128, 128, 128] : scaleColour(share);
      pixels.data[at] = colour[0]; pixels.data[at + 1] = colour[1]; pixels.data[at + 2] = colour[2]; pixels.data[at + 3] = 255;
    }
  }
  ink.putImageData(pixels, 0, 0);
  matrix.setAttribute("aria-label", `Attention of ${tokens} tokens to ${tokens} tokens, layer ${data.layers[state.layer].label}, head ${state.head}`);
  const range = `Tokens from ${place.names[0]} to ${place.names[tokens - 1]}.`;
  $("matrix-note").textContent = `${range} ${state.scores ? `Scores from ${plain(low, 2)} (dark) to ${plain(high, 2)} (light).` : "Each row is brightest at its own largest share."}`;
}
const cellOf = (event) => {
  const { tokens } = data.layers[state.layer];
  const { left, top, width, height } = matrix.getBoundingClientRect();
  const clamp = (share) => Math.min(tokens - 1, Math.max(0, Math.floor(share * tokens)));
  return [clamp((event.clientY - top) / height), clamp((event.clientX - left) / width)];
};
matrix.onpointermove = (event) => {
  if (event.pointerType !== "mouse" || !shown) return;
  const [query, key] = cellOf(event);
  point(query, key, event, `${place.names[query]} → ${place.names[key]}: ${spell(valueAt(query, key), state.scores)}`);
};
matrix.onpointerleave = leave;
matrix.onclick = (event) => pick(...cellOf(event));

/* A button for each head, over one canvas for all: a canvas each would cost time in every frame. */
const places = data.layers.map((_, layer) => placeOf(layer));
const sizeOf = ({ columns, rows, frames }) => [columns * Math.max(frames, 1), rows];
const buttons = layerHeadTable($("heads"), data.layers.length, total, "heads", (layer, head) => {
  const missing = head >= data.layers[layer].heads;
  return make("button", { type: "button", label: `Layer ${data.layers[layer].label}, head ${head}`, title: `layer ${data.layers[layer].label}, head ${head}`, hidden: missing,
    style: { "aspect-ratio": sizeOf(places[layer]).join(" / ") }, onclick: () => show({ layer, head }) });
}, data.layers.map(({ label }) => label.replace(/^(stages\.)?(.*?)blocks\./, "$2")));
const thumbs = make("canvas", { className: "thumbs", ariaHidden: "true" });
$("heads").append(thumbs);
const thumb = make("canvas");
function paintThumb(made, layer, head) {
  const spots = places[layer];
  const { tokens } = made;
  const [scores, shares] = [new Float32Array(tokens), new Float32Array(tokens)];
  store.fill(made, (mapOf(layer) + head) * tokens + Math.min(state.query, tokens - 1), scores, shares);
  const [width, height] = sizeOf(spots);
  if (thumb.width !== width || thumb.height !== height) { thumb.width = width; thumb.height = height; }
  const ink = thumb.getContext("2d");
  const pixels = ink.createImageData(width, height);
  const values = state.scores ? scores : shares;
  const [low, high] = ends(values);
  for (let token = 0; token < tokens; token++) {
    const spot = spots.frames ? spots.at(token) : { frame: 0, row: 0, column: token };
    if (!spot) continue;
    const colour = values[token] === -Infinity ? [128, 128, 128] : scaleColour((values[token] - low) / (high - low || 1));
    const at = 4 * (spot.row * width + spot.frame * spots.columns + spot.column);
    pixels.data[at] = colour[0]; pixels.data[at + 1] = colour[1]; pixels.data[at + 2] = colour[2]; pixels.data[at + 3] = 255;
  }
  ink.putImageData(pixels, 0, 0);
}
function paintThumbs() {
  const table = $("heads");
  const ratio = Math.min(devicePixelRatio, 2);
  const [width, height] = [Math.round(table.clientWidth * ratio), Math.round(table.clientHeight * ratio)];
  if (thumbs.width !== width || thumbs.height !== height) { thumbs.width = width; thumbs.height = height; }
  const ink = thumbs.getContext("2d");
  ink.clearRect(0, 0, width, height);
  ink.imageSmoothingEnabled = false;
  buttons.forEach((button, i) => {
    const [layer, head] = [Math.floor(i / total), i % total];
    const made = store.ready(layer);
    button.setAttribute("aria-pressed", layer === state.layer && head === state.head);
    if (!made || button.hidden) return;
    paintThumb(made, layer, head);
    ink.drawImage(thumb, button.offsetLeft * ratio, button.offsetTop * ratio, button.offsetWidth * ratio, button.offsetHeight * ratio);
  });
}
new ResizeObserver(() => root.dataset.ready && paintThumbs()).observe($("heads"));

function options(select, names, chosen) {
  select.replaceChildren(...names.map((name, value) => make("option", { value, textContent: name })));
  select.value = chosen;
}
async function show(change) {
  Object.assign(state, change);
  const { heads, windows, within, tokens, scores } = data.layers[state.layer];
  state.head = Math.min(state.head, heads - 1);
  state.window = Math.min(state.window, Math.max(windows, 1) - 1);
  state.scores &&= scores;
  const asked = JSON.stringify([state.layer, state.head, state.window]);
  const made = await store.load(state.layer);
  if (asked !== JSON.stringify([state.layer, state.head, state.window])) return;
  place = placeOf(state.layer);
  if (within === "frame") place.photo = state.window;
  [state.query, state.key] = [Math.min(state.query, tokens - 1), Math.min(state.key, tokens - 1)];
  shown = store.head(made, mapOf(state.layer) + state.head);
  out.lay(place);
  into.lay(place);
  options($("layer"), data.layers.map((layer) => layer.label), state.layer);
  options($("head"), Array.from({ length: heads }, (_, head) => head), state.head);
  if ($("window")) { $("window-label").hidden = !windows; $("window-kind").textContent = within && within[0].toUpperCase() + within.slice(1); options($("window"), Array.from({ length: windows }, (_, at) => `${at} of ${windows}`), state.window); }
  document.querySelectorAll("[name=what]").forEach((radio) => { radio.disabled = !scores; radio.checked = (radio.value === "scores") === state.scores; });
  paintMatrix();
  paint();
  paintThumbs();
}
$("layer").onchange = (event) => show({ layer: Number(event.target.value) });
$("head").onchange = (event) => show({ head: Number(event.target.value) });
if ($("window")) $("window").onchange = (event) => show({ window: Number(event.target.value) });
if ($("cover")) $("cover").oninput = (event) => { state.cover = event.target.value / 100; paint(); };
document.querySelectorAll("[name=what]").forEach((radio) => { radio.onchange = () => show({ scores: radio.value === "scores" }); });
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const { layer, head } = state;
  const turn = (at, step, n) => (at + step + n) % n;
  const move = { l: { layer: turn(layer, 1, data.layers.length) }, L: { layer: turn(layer, -1, data.layers.length) },
    h: { head: turn(head, 1, data.layers[layer].heads) }, H: { head: turn(head, -1, data.layers[layer].heads) },
    s: { scores: !state.scores } }[event.key];
  if (move) show(move);
  const step = { n: 1, N: -1 }[event.key];
  if (step && tour.ranked.length) stop(turn(tour.at, step, tour.ranked.length));
  const cover = { c: 10, C: -10 }[event.key];
  if (cover && $("cover")) { $("cover").value = Number($("cover").value) + cover; $("cover").oninput({ target: $("cover") }); }
};
/* The tour: kinds of token, and for the chosen kind the heads that attend to it more than if attention were uniform, the most first. */
const MOST_RANKED = 12;
const more = (share) => `+${(100 * share).toFixed(0)} %`;
const ranking = (values) => values.flatMap((row, layer) => row.map((value, head) => [value, layer, head])).filter(([value, layer, head]) => value > 0.005 && head < data.layers[layer].heads).sort((a, b) => b[0] - a[0]).slice(0, MOST_RANKED);
const kinds = Object.entries(data.kinds).map(([kind, values]) => [kind.replace("_", " "), ranking(values)]).filter(([, ranked]) => ranked.length);
const tour = { ranked: [], at: 0 };
function stop(at) {
  tour.at = at;
  const [, layer, head] = tour.ranked[at];
  [...$("ranked").children].forEach((item, i) => item.firstChild.setAttribute("aria-pressed", i === at));
  show({ layer, head });
}
const chips = kinds.map(([kind, ranked], at) => {
  const [share, layer, head] = ranked[0];
  return make("button", { type: "button", className: "chip", pressed: false, textContent: `${kind}: layer ${data.layers[layer].label} head ${head}, ${more(share)}`,
    title: `of all heads this one attends most to ${kind}, compared with uniform attention`, onclick: () => {
      chips.forEach((chip, i) => chip.setAttribute("aria-pressed", i === at));
      tour.ranked = ranked;
      $("ranked").replaceChildren(...ranked.map(([value, layer, head], place) => make("li", {}, make("button", { type: "button", className: "chip", pressed: false,
        textContent: `layer ${data.layers[layer].label} head ${head} ${more(value)}`, onclick: () => stop(place) }))));
      $("ranked").setAttribute("aria-label", `Heads by how much they attend to ${kind}, the most first`);
      stop(0);
    } });
});
$("tour").append(...chips);
if (!kinds.length) { $("tour").remove(); $("ranked").remove(); }

await Promise.all(photos.map((photo) => photo.decode()));
await show({});
root.dataset.ready = "yes";
const idle = window.requestIdleCallback ?? ((then) => setTimeout(then, 30));
for (let layer = 0; layer < data.layers.length; layer++) {
  await new Promise((then) => idle(then));
  await store.load(layer);
}
paintThumbs();
root.dataset.unpacked = "yes";
