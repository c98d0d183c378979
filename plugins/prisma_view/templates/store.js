/* The attention of a layer: codes of scores, and the smallest score and the step of each row. Unpacked when first asked for. */
const store = (() => {
  const unpacked = new Map();
  function bytesOf(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }
  async function unpackLayer(layer) {
    const { windows, heads, tokens } = data.layers[layer];
    const tag = $(`layer-${layer}`);
    const stream = new Blob([bytesOf(tag.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    tag.remove();
    const rows = Math.max(windows, 1) * heads * tokens;
    const size = rows * tokens;
    return {
      tokens, low: new Float32Array(buffer, 0, rows), step: new Float32Array(buffer, 4 * rows, rows),
      fine: new Uint8Array(buffer, 8 * rows, size), coarse: new Uint8Array(buffer, 8 * rows + size, size),
    };
  }
  const load = (layer) => {
    if (!unpacked.has(layer)) unpacked.set(layer, unpackLayer(layer).then((made) => { unpacked.set(layer, made); return made; }));
    return unpacked.get(layer);
  };
  /* The layer if it is unpacked already. */
  const ready = (layer) => { const made = unpacked.get(layer); return made && !(made instanceof Promise) ? made : null; };

  /* Fill a row of scores and of shares, their softmax; both are minus infinity where there is no attention. */
  function fill({ tokens, low, step, fine, coarse }, row, scores, shares, at = 0) {
    let most = -Infinity;
    for (let key = 0; key < tokens; key++) {
      const code = fine[row * tokens + key] | (coarse[row * tokens + key] << 8);
      const score = code ? low[row] + (code - 1) * step[row] : -Infinity;
      scores[at + key] = score;
      if (score > most) most = score;
    }
    let sum = 0;
    for (let key = 0; key < tokens; key++) sum += shares[at + key] = most > -Infinity ? Math.exp(scores[at + key] - most) : 0;
    for (let key = 0; key < tokens; key++) shares[at + key] = scores[at + key] > -Infinity ? shares[at + key] / sum : -Infinity;
  }
  /* All rows of a head. */
  function head(made, map) {
    const { tokens } = made;
    const scores = new Float32Array(tokens * tokens);
    const shares = new Float32Array(tokens * tokens);
    for (let query = 0; query < tokens; query++) fill(made, map * tokens + query, scores, shares, query * tokens);
    return { scores, shares };
  }
  return { load, ready, fill, head };
})();
