{
  const layout = data.attention;
  const [layers, heads, tokens] = layout.share.shape;
  const [top, share] = await Promise.all([unpack(layout.top), unpack(layout.share)]);
  const first = layout.prefix.length;
  const { rows, columns, steps } = layout;
  const state = { layer: layers - 1, head: 0, query: 0 };

  /* The weights from one token, as shares of the largest, and that largest. */
  function from(layer, head, query) {
    const row = (layer * heads + head) * tokens + query;
    return { most: top[row], weights: Array.from(share.subarray(row * tokens, (row + 1) * tokens), (step) => (step / steps) ** 2) };
  }

  const pick = (query) => { state.query = query; paintThumbs(); paint(); };
  const weightTo = (token) => { const { most, weights } = from(state.layer, state.head, state.query); return most * weights[token]; };
  const grid = patchGrid($("attention-grid"), layout, {
    label: "Patches of the image; choose the one that reads",
    onPick: pick,
    onHover: (token, event) => showTip(`${tokenName(layout, token)}: ${percent(weightTo(token))}`, event),
    onLeave: hideTip,
  });
  const chips = tokenChips($("attention-tokens"), layout, pick);
  const thumbs = layerHeadTable($("heads"), layers, heads, "heads", (layer, head) =>
    make("button", { type: "button", label: `Block ${layer}, head ${head}`, title: `block ${layer}, head ${head}`, onclick: () => { Object.assign(state, { layer, head }); paint(); } },
      make("canvas", { width: columns, height: rows })));
  const shape = $("attention-grid").style.aspectRatio;
  thumbs.forEach((thumb) => { thumb.firstChild.style.aspectRatio = shape; });

  function paintThumbs() {
    thumbs.forEach((thumb, i) => {
      const { weights } = from(Math.floor(i / heads), i % heads, state.query);
      const patches = weights.slice(first);
      const most = Math.max(...patches, 1e-9);
      const ink = thumb.firstChild.getContext("2d");
      const pixels = ink.createImageData(columns, rows);
      patches.forEach((weight, patch) => pixels.data.set([...scaleColour(weight / most), 255], 4 * patch));
      ink.putImageData(pixels, 0, 0);
    });
  }

  /* The whole pattern of a head: every row as bright as its own largest weight. */
  const square = $("square");
  square.width = square.height = tokens;
  square.onclick = (event) => pick(Math.min(tokens - 1, Math.max(0, Math.floor((event.offsetY / square.clientHeight) * tokens))));
  function paintSquare() {
    const ink = square.getContext("2d");
    const pixels = ink.createImageData(tokens, tokens);
    for (let query = 0; query < tokens; query++) {
      from(state.layer, state.head, query).weights.forEach((weight, key) =>
        pixels.data.set([...scaleColour(Math.sqrt(weight)), 255], 4 * (query * tokens + key)));
    }
    ink.putImageData(pixels, 0, 0);
    $("reader").style.top = `${(100 * state.query) / tokens}%`;
    $("reader").style.height = `${100 / tokens}%`;
  }

  function paint() {
    const { layer, head, query } = state;
    paintSquare();
    const { most, weights } = from(layer, head, query);
    const brightest = Math.max(...weights.slice(first), 1e-9);
    grid.cells.forEach((cell, patch) => {
      cell.style.backgroundColor = `rgb(8 9 14 / ${(0.88 * (1 - Math.sqrt(weights[first + patch] / brightest))).toFixed(3)})`;
      cell.setAttribute("aria-label", `${tokenName(layout, first + patch)}: ${percent(most * weights[first + patch])}`);
    });
    grid.choose(query);
    chips.forEach((chip, token) => {
      chip.setAttribute("aria-pressed", token === query);
      chip.textContent = `${layout.prefix[token]} (gets ${percent(most * weights[token])})`;
    });
    thumbs.forEach((thumb, i) => thumb.setAttribute("aria-pressed", i === layer * heads + head));
    const best = weights.map((weight, token) => [weight * most, token]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    const listed = best.map(([weight, token]) => `${percent(weight)} from the ${tokenName(layout, token)}`);
    const reader = tokenName(layout, query);
    $("attention-words").textContent = `Block ${layer}, head ${head}: the ${reader} reads ${listed.slice(0, -1).join(", ")} and ${listed.at(-1)}.`;
  }

  if (layout.side > 1) {
    $("attention-note").hidden = false;
    $("attention-note").textContent = `To keep this page light, groups of ${layout.side} × ${layout.side} patches are taken together here.`;
  }
  if (!first) state.query = Math.floor((rows * columns) / 2 + columns / 2);

  /* Start at the head of the last block that is choosiest among patches. */
  const choosy = (head) => {
    const { most, weights } = from(state.layer, head, state.query);
    return weights.slice(first).reduce((sum, weight) => sum + (most * weight) ** 2, 0);
  };
  state.head = Array.from({ length: heads }, (_, head) => head).reduce((a, b) => (choosy(b) > choosy(a) ? b : a));
  paintThumbs();
  paint();
}
