const PAGE = 24;
let index = null, home = "", order = [], page = 0, current = null;
const chunks = new Map(), arrived = new Map();
const short = (x) => (Math.abs(x) >= 10000 || (x && Math.abs(x) < 0.0001) ? x.toExponential(1) : Number(x.toPrecision(3)).toString()).replaceAll("-", "−");
const share = (x) => (x > 0 && x < 0.0001 ? "<0.01 %" : `${Number((100 * x).toPrecision(2))} %`);
const title = (unit) => (index.sheets ? index.names[unit] : index.names[unit] ? `${unit} ${index.names[unit]}` : String(unit));
/* The images of a page of one unit are inside it. */
const sheetOf = (at) => index.sheets?.[at] ?? `${home}${String(at).padStart(4, "0")}.jpg`;

/* The data of a unit, from the script that holds it. */
function load(unit) {
  const at = Math.floor(unit / index.chunk);
  if (!chunks.has(at)) {
    chunks.set(at, new Promise((resolve, reject) => {
      arrived.set(at, resolve);
      if (index.sheets) return; /* the page hands them over itself */
      document.head.append(make("script", { src: `${home}units-${String(at).padStart(4, "0")}.js`, onerror: () => { chunks.delete(at); reject(new Error(`${home}units-${at} is missing: was the gallery written anew? Load the page again.`)); } }));
    }));
  }
  return chunks.get(at).then((units) => units[unit - at * index.chunk]);
}

/* A small image with its patches lit; zoom shows the surroundings of its top patch alone. */
function tile([thumb, value, place, spot, name, heat], { close = false, mark = false } = {}) {
  const { across, size: [wide, tall], grid: [rows, columns] } = index;
  const sheet = Math.floor(thumb / across ** 2);
  const here = thumb % across ** 2;
  const down = Math.ceil(Math.min(index.thumbs - sheet * across ** 2, across ** 2) / across);
  const zoom = close && spot[1] >= 0 ? [Math.max(1, columns / 3), Math.max(1, rows / 3)] : [1, 1];
  const shift = (at, n, z) => Math.min(Math.max(((at + 0.5) / n) * z - 0.5, 0), z - 1);
  const place_ = (cell, at, n, z, many) => (many * z > 1 ? (100 * (cell * z + (z > 1 ? shift(at, n, z) : 0))) / (many * z - 1) : 0);
  const box = make("div", { className: "tile", role: "img", label: `${name}: ${short(value)} at ${place}`, title: `${name}: ${short(value)} at ${place}`, style: {
    "aspect-ratio": close ? `${wide / zoom[0]} / ${tall / zoom[1]}` : `${wide} / ${tall}`,
    "background-image": `url("${sheetOf(sheet)}")`,
    "background-size": `${100 * across * zoom[0]}% ${100 * down * zoom[1]}%`,
    "background-position": `${place_(here % across, spot[2], columns, zoom[0], across)}% ${place_(Math.floor(here / across), spot[1], rows, zoom[1], down)}%`,
  } });
  if (close || !rows) return box;
  const canvas = make("canvas", { width: columns, height: rows });
  const ink = canvas.getContext("2d");
  const pixels = ink.createImageData(columns, rows);
  const bytes = atob(heat);
  for (let cell = 0; cell < rows * columns; cell++) {
    pixels.data.set([8, 9, 14, 205 * (1 - Math.sqrt(bytes.charCodeAt(cell) / 255))], 4 * cell);
  }
  ink.putImageData(pixels, 0, 0);
  box.append(canvas);
  if (mark && spot[1] >= 0) {
    box.append(make("i", { style: { left: `${(100 * spot[2]) / columns}%`, top: `${(100 * spot[1]) / rows}%`, width: `${100 / columns}%`, height: `${100 / rows}%` } }));
  }
  return box;
}

/* ---------------------------------------------------------------- all units */

function sort() {
  const query = $("query").value.trim().toLowerCase();
  const words = query.split(/\s+/).filter(Boolean);
  const text = (unit) => `${unit} ${index.names[unit]} ${index.search[unit]}`.toLowerCase();
  order = Array.from({ length: index.n }, (_, unit) => unit);
  if (/^\d+$/.test(query)) order = order.filter((unit) => String(unit).startsWith(query));
  else if (words.length) order = order.filter((unit) => { const all = text(unit); return words.every((word) => all.includes(word)); });
  const by = { strong: (unit) => -index.largest[unit], rare: (unit) => index.share[unit] || 2, common: (unit) => -index.share[unit] }[$("order").value];
  if (by) order.sort((a, b) => by(a) - by(b) || a - b);
  $("count").textContent = `${order.length} of ${index.n} ${index.kind}s`;
}
function overview() {
  const pages = Math.max(1, Math.ceil(order.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  $("cards").replaceChildren(...order.slice(page * PAGE, (page + 1) * PAGE).map((unit) => {
    const four = make("div", { className: "four" });
    load(unit).then(({ top }) => four.replaceChildren(...top.slice(0, 4).map((each) => tile(each))), (error) => { four.textContent = error.message; });
    return make("a", { className: "unit-card", href: `#${unit}`, label: `${index.kind} ${title(unit)}, largest ${short(index.largest[unit])}, positive on ${share(index.share[unit])} of tokens` },
      make("h2", {}, make("span", { textContent: title(unit) }), make("small", { textContent: index.largest[unit] > 0 ? `max ${short(index.largest[unit])}` : "never above 0" })), four,
      make("p", { textContent: index.search[unit], title: index.search[unit] }));
  }));
  $("page").textContent = `${page + 1} of ${pages}`;
  $("before").disabled = page === 0;
  $("after").disabled = page === pages - 1;
}
const turn = (step) => { page += step; overview(); scrollTo(0, 0); };

/* ---------------------------------------------------------------- one unit */

function histogram(counts) {
  const used = counts.map((count, bin) => (count ? bin : -1)).filter((bin) => bin >= 0);
  const [first, last] = [used[0] ?? 0, used.at(-1) ?? 0];
  const most = Math.log1p(Math.max(...counts, 1));
  const total = counts.reduce((a, b) => a + b, 0);
  const edge = (bin) => index.edges[Math.min(Math.max(bin, 0), index.edges.length - 1)];
  const bars = counts.slice(first, last + 1).map((count, at) => {
    const [low, high] = [edge(first + at - 1), edge(first + at)];
    return make("i", { className: low >= 0 ? "plus" : "", title: `${short(low)} to ${short(high)}: ${count} tokens`, style: { height: `${(100 * Math.log1p(count)) / most}%` } });
  });
  const words = `${total} tokens from ${short(edge(first - 1))} to ${short(edge(last))}; heights are logarithms, bins half octaves`;
  return [make("div", { className: "counts", role: "img", label: `Histogram of ${words}` }, ...bars),
    make("div", { className: "ends" }, make("span", { textContent: short(edge(first - 1)) }), make("span", { textContent: short(edge(last)) })), make("p", { className: "note", textContent: `${words}.` })];
}
function rows(list) {
  const most = Math.max(...list.map(([, value]) => Math.abs(value)), 1e-9);
  const signs = list.some(([, value]) => value < 0);
  return make("ul", { className: "rows" }, ...list.map(([name, value]) => {
    const width = (signs ? 50 : 100) * Math.abs(value) / most;
    const bar = make("i", { style: { width: `${width}%`, left: signs ? `${value < 0 ? 50 - width : 50}%` : 0, background: `var(--${value < 0 ? "less" : "more"})` } });
    return make("li", {}, make("span", { textContent: name, title: name }), make("span", { className: "track", ariaHidden: "true" }, bar), make("span", { className: "number", textContent: short(value) }));
  }));
}
function alike(list) {
  return make("div", { className: "alike" }, ...list.map(([unit, cosine]) => {
    const link = make("a", { href: `#${unit}`, label: `${index.kind} ${title(unit)}, cosine ${short(cosine)}` }, make("span", { textContent: title(unit) }), make("span", { textContent: `cosine ${short(cosine)}` }));
    load(unit).then(({ top }) => top.length && link.prepend(tile(top[0])));
    return link;
  }));
}
function part(name, ...content) {
  const why = index.why[name.toLowerCase()];
  return content.length ? make("div", {}, make("h3", { textContent: name }), ...content) : why ? make("div", {}, make("h3", { textContent: name }), make("p", { className: "note", textContent: `Left out: ${why}` })) : "";
}
async function unitPage(unit) {
  const made = await load(unit);
  if (current !== unit) return;
  const figure = (each, options) => make("figure", {}, tile(each, options), make("figcaption", {}, make("b", { textContent: short(each[1]) }), options.close ? "" : ` ${each[4]}${each[3][1] < 0 ? `, ${each[2]}` : ""}`));
  const at = order.indexOf(unit);
  const link = (name, to) => make("a", { textContent: name, href: to === undefined ? "#" : `#${to}` });
  $("unit").replaceChildren(
    index.sheets ? "" : make("nav", { className: "turn", label: "Units" }, link("all"), ...(at > 0 ? [link(`← ${order[at - 1]}`, order[at - 1])] : []), ...(at >= 0 && at < order.length - 1 ? [link(`${order[at + 1]} →`, order[at + 1])] : [])),
    make("h2", { textContent: `${index.kind} ${title(unit)}`, tabIndex: -1 }),
    make("p", { textContent: `Largest ${short(index.largest[unit])}, mean ${short(index.mean[unit])}, positive on ${share(index.share[unit])} of the tokens of ${index.seen} images (${index.unit}).` }),
    made.top.length ? part("Top images", make("div", { className: "images" }, ...made.top.map((each) => figure(each, { mark: true })))) : make("p", { className: "note", textContent: "It is 0 on every token: no image is its top." }),
    ...(made.top.some(([, , , spot]) => spot[1] >= 0) ? [part("Top patches and what surrounds them", make("div", { className: "images close" }, ...made.top.filter(([, , , spot]) => spot[1] >= 0).map((each) => figure(each, { close: true }))))] : []),
    make("div", { className: "beside" }, part("Scores", ...histogram(made.histogram)),
      part("Effects on classes", ...(made.effects ? [rows(made.effects), make("p", { className: "note", textContent: index.note })] : [])),
      part("Nearest words", ...(made.words ? [rows(made.words)] : []))),
    part("Similar units", ...(made.similar ? [alike(made.similar)] : [])));
  document.title = `${index.kind} ${title(unit)} · ${index.title}`;
  root.dataset.unit = unit;
}

/* ---------------------------------------------------------------- both */

function route() {
  const unit = index.sheets ? 0 : /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : null;
  current = unit !== null && unit < index.n ? unit : null;
  $("overview").hidden = current !== null;
  $("unit").hidden = current === null;
  delete root.dataset.unit;
  if (current === null) { document.title = `${index.title} · Prisma gallery`; overview(); return; }
  scrollTo(0, 0);
  unitPage(current).catch((error) => { $("unit").textContent = error.message; });
}
$("query").oninput = () => { page = 0; sort(); if (current !== null) location.hash = ""; else overview(); };
$("order").onchange = () => { page = 0; sort(); if (current === null) overview(); else route(); };
$("lights").onchange = () => document.body.classList.toggle("dull", !$("lights").checked);
$("before").onclick = () => turn(-1);
$("after").onclick = () => turn(1);
addEventListener("hashchange", () => index && route());
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !index || index.sheets) return;
  const typing = event.target.matches("input[type=search], select");
  if (event.key === "Escape") { if (typing) event.target.blur(); if (current !== null) location.hash = ""; return; }
  if (typing) return;
  if (event.key === "/") { event.preventDefault(); $("query").focus(); }
  if (event.key === "l") $("lights").click();
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  if (current === null) { if (!$(step < 0 ? "before" : "after").disabled) turn(step); return; }
  const next = order[order.indexOf(current) + step];
  if (next !== undefined) location.hash = next;
};
return {
  index: (made) => { index = made; home = (document.currentScript.getAttribute("src") ?? "").replace("index.js", ""); sort(); route(); root.dataset.ready = "yes"; },
  chunk: (at, units) => arrived.get(at)?.(units),
};
