/* Where tokens stand: words, or an image of patches with the other tokens beside it; windows stand by themselves, and
   tokens whose place is not known are numbered. */
function placeOf(layer) {
  const { within, grid, tokens } = data.layers[layer];
  if (data.words.length) return { names: data.words, loose: data.words.map((_, token) => token), frames: 0, rows: 1, columns: tokens, at: () => null };
  const inImage = data.place && (!within || within === "frame") ? { ...data.place, frames: within ? 1 : data.place.frames } : null;
  const known = inImage && tokens === inImage.prefix.length + inImage.frames * inImage.rows * inImage.columns;
  const side = Math.ceil(Math.sqrt(tokens));
  const [high, wide] = grid ?? [Math.ceil(tokens / side), side];
  const place = known ? inImage : { prefix: [], frames: 1, rows: high, columns: wide, first: "frame" };
  const { prefix, frames, rows, columns, first } = place;
  const start = prefix.length;
  const area = rows * columns;
  function at(token) {
    if (token < start) return null;
    const patch = token - start;
    const [frame, cell] = first === "row" ? [patch % frames, Math.floor(patch / frames)] : [Math.floor(patch / area), patch % area];
    return { frame, row: Math.floor(cell / columns), column: cell % columns };
  }
  const token = ({ frame, row, column }) => start + (first === "row" ? (row * columns + column) * frames + frame : frame * area + row * columns + column);
  const names = Array.from({ length: tokens }, (_, index) => {
    const spot = at(index);
    if (!spot) return prefix[index];
    if (!known && (!grid || within === "patch")) return `${within === "patch" ? "frame" : "token"} ${index + 1}`;
    return `${frames > 1 ? `frame ${spot.frame + 1}, ` : ""}${within === "window" ? "place" : "patch"} in row ${spot.row + 1}, column ${spot.column + 1}`;
  });
  return { names, loose: prefix.map((_, index) => index), frames, rows, columns, at, token, count: tokens, apart: !known && (within !== "" || !grid), photo: 0 };
}

const photos = [...document.querySelectorAll(".frame-source")];
/* Without its own colours an image does not mix with those above it. */
const greys = new Map();
function grey(photo) {
  if (!greys.has(photo)) {
    const canvas = make("canvas", { width: photo.naturalWidth, height: photo.naturalHeight });
    const ink = canvas.getContext("2d");
    ink.filter = "grayscale(1)";
    ink.drawImage(photo, 0, 0);
    greys.set(photo, canvas);
  }
  return greys.get(photo);
}
const spell = (value, scores) => (value === -Infinity ? "masked" : scores ? plain(value, 2) : value > 0 && value < 0.001 ? "<0.1 %" : `${(100 * value).toFixed(1)} %`);

/* A board shows a value for each token. It calls onPoint(token, event) while pointed at, onLeave, and onPick(token). */
function board(box, { onPoint, onLeave, onPick, label }) {
  const canvas = make("canvas");
  const pad = make("div", { className: "pad", tabIndex: 0, role: "application" }, canvas);
  const loose = make("div", { className: "loose" });
  box.append(pad, loose);
  let place, chips = [], across = 1, ratio = 1, last = null;

  function lay(next) {
    place = next;
    pad.hidden = !place.frames;
    across = Math.ceil(Math.sqrt(place.frames)) || 1;
    ratio = photos.length && !place.apart ? photos[0].naturalHeight / photos[0].naturalWidth : place.rows / place.columns;
    loose.className = `loose ${place.frames ? "" : "text"}`;
    chips = place.loose.map((token) => make("button", { type: "button", className: "token", onclick: () => onPick(token) }, make("span", { textContent: place.names[token] }), make("small")));
    chips.forEach((chip, i) => {
      chip.onpointermove = (event) => event.pointerType === "mouse" && onPoint(place.loose[i], event);
      chip.onpointerleave = onLeave;
      chip.onfocus = () => chip.matches(":focus-visible") && onPick(place.loose[i]);
    });
    loose.replaceChildren(...chips);
  }
  function size() {
    const down = Math.ceil(Math.max(place.frames, 1) / across);
    const width = Math.round(pad.clientWidth * Math.min(devicePixelRatio, 2));
    const height = Math.round((width / across) * ratio) * down;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    return { wide: width / across, tall: height / down };
  }
  const corner = (frame, wide, tall) => [(frame % across) * wide, Math.floor(frame / across) * tall];

  /* The images without colours above them, at the size they are drawn in. */
  const ground = make("canvas");
  let drawn = "";
  function lie(wide, tall, coloured) {
    const wanted = [canvas.width, canvas.height, coloured, place.apart, place.photo].join();
    if (drawn === wanted) return;
    drawn = wanted;
    ground.width = canvas.width;
    ground.height = canvas.height;
    const ink = ground.getContext("2d");
    for (let frame = 0; frame < place.frames; frame++) {
      const photo = place.apart ? null : photos[Math.min(frame + place.photo, photos.length - 1)];
      if (photo) ink.drawImage(coloured ? photo : grey(photo), ...corner(frame, wide, tall), wide, tall);
      else { ink.fillStyle = "#808080"; ink.fillRect(...corner(frame, wide, tall), wide, tall); }
    }
  }
  /* A pixel for each patch, drawn large. */
  const cells = make("canvas");
  function colour(values, low, high, cover) {
    const [width, height] = [place.columns * across, place.rows * Math.ceil(place.frames / across)];
    if (cells.width !== width || cells.height !== height) { cells.width = width; cells.height = height; }
    const ink = cells.getContext("2d");
    const pixels = ink.createImageData(width, height);
    for (let token = 0; token < values.length; token++) {
      const spot = place.at(token);
      if (!spot) continue;
      const none = values[token] === -Infinity;
      const [red, green, blue] = none ? [128, 128, 128] : scaleColour((values[token] - low) / (high - low || 1));
      const [left, top] = corner(spot.frame, place.columns, place.rows);
      const at = 4 * ((top + spot.row) * width + left + spot.column);
      pixels.data[at] = red; pixels.data[at + 1] = green; pixels.data[at + 2] = blue;
      pixels.data[at + 3] = 255 * (none ? 0.6 : place.apart ? 1 : cover);
    }
    ink.putImageData(pixels, 0, 0);
  }

  function paint(values, low, high, chosen, cover, scores) {
    last = [values, low, high, chosen, cover, scores];
    if (place.frames && pad.clientWidth) {
      const ink = canvas.getContext("2d");
      const { wide, tall } = size();
      const [x, y] = [wide / place.columns, tall / place.rows];
      lie(wide, tall, cover <= 0.05);
      colour(values, low, high, cover);
      ink.drawImage(ground, 0, 0);
      ink.imageSmoothingEnabled = false;
      ink.drawImage(cells, 0, 0, canvas.width, canvas.height);
      const spot = place.at(chosen);
      if (spot) {
        const [left, top] = corner(spot.frame, wide, tall);
        for (const [line, width] of [["#000", 5], ["#fff", 2]]) {
          ink.strokeStyle = line; ink.lineWidth = width;
          ink.strokeRect(left + spot.column * x, top + spot.row * y, x, y);
        }
      }
    }
    chips.forEach((chip, i) => {
      const token = place.loose[i];
      const none = values[token] === -Infinity;
      const colour = none ? [128, 128, 128] : scaleColour((values[token] - low) / (high - low || 1));
      chip.style.background = rgb(colour);
      chip.style.color = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140 ? "#000" : "#fff";
      chip.lastChild.textContent = none ? "–" : spell(values[token], scores);
      chip.classList.toggle("chosen", token === chosen);
      chip.setAttribute("aria-pressed", token === chosen);
    });
    pad.setAttribute("aria-label", `${label}. ${place.names[chosen]} is chosen; arrow keys choose another patch.`);
  }
  function under(event) {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const down = Math.ceil(place.frames / across);
    const [x, y] = [((event.clientX - left) / width) * across, ((event.clientY - top) / height) * down];
    const frame = Math.floor(y) * across + Math.floor(x);
    if (x < 0 || y < 0 || x >= across || y >= down || frame >= place.frames) return null;
    const token = place.token({ frame, row: Math.min(place.rows - 1, Math.floor((y % 1) * place.rows)), column: Math.min(place.columns - 1, Math.floor((x % 1) * place.columns)) });
    return token < place.count ? token : null;
  }
  pad.onpointermove = (event) => { const token = under(event); if (event.pointerType === "mouse" && token !== null) onPoint(token, event); };
  pad.onpointerleave = onLeave;
  pad.onclick = (event) => { const token = under(event); if (token !== null) onPick(token); };
  pad.onkeydown = (event) => {
    const spot = place.at(last[3]) ?? { frame: 0, row: 0, column: -1 };
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
    if (down === undefined) return;
    event.preventDefault();
    const [row, column] = [spot.row + down, spot.column + right];
    if (row < 0 || column < 0 || row >= place.rows || column >= place.columns) {
      const frame = spot.frame + Math.sign(down + right);
      if (frame >= 0 && frame < place.frames) onPick(place.token({ frame, row: (row + place.rows) % place.rows, column: (column + place.columns) % place.columns }));
      return;
    }
    const next = place.token({ frame: spot.frame, row, column });
    if (next < place.count) onPick(next);
  };
  new ResizeObserver(() => last && paint(...last)).observe(pad);
  return { lay, paint };
}
