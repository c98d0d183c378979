if (data.lens) {
  const layout = data.layout;
  const { stages } = data.lens;
  const [classes, logits, chances, maps] = await Promise.all(["classes", "logits", "chances", "maps"].map((part) => unpack(data.lens[part])));
  const [, tokens, guesses] = data.lens.classes.shape;
  const shown = data.shown.length;
  const first = layout.prefix.length;
  const patches = layout.rows * layout.columns;
  const guess = (stage, token, rank = 0) => {
    const at = (stage * tokens + token) * guesses + rank;
    return { index: classes[at], logit: logits[at], share: chances[at] };
  };
  const state = { stage: stages.length - 1, token: 0, colour: "class", of: "best" };

  function logitOf(stage, token) {
    if (state.of === "best") return guess(stage, token).logit;
    return maps[(stage * tokens + token) * shown + Number(state.of)];
  }
  let range = [0, 1];
  function measure() {
    const every = [];
    for (let stage = 0; stage < stages.length; stage++) for (let patch = 0; patch < patches; patch++) every.push(logitOf(stage, first + patch));
    every.sort((a, b) => a - b);
    range = [every[Math.floor(every.length * 0.01)], every[Math.ceil(every.length * 0.99) - 1]];
    $("ramp-low").textContent = plain(range[0]);
    $("ramp-high").textContent = plain(range[1]);
  }
  const ofLogit = (stage, token) => scaleColour((logitOf(stage, token) - range[0]) / Math.max(range[1] - range[0], 1e-6));
  const strength = (index, share) => (0.4 + 0.6 * share) * (quiet.has(index) ? 0.45 : 1);
  function cellColour(stage, token) {
    if (state.colour === "none") return "transparent";
    if (state.colour === "logit") return rgb(ofLogit(stage, token), 0.82);
    const { index } = guess(stage, token);
    return rgb(classColour(index), quiet.has(index) ? 0.42 : 0.66);
  }
  const say = (stage, token) => {
    const { index, logit, share } = guess(stage, token);
    return `${called(index)} · logit ${plain(logit)} · ${percent(share)}`;
  };

  const grid = patchGrid($("lens-grid"), layout, {
    label: "Patches of the image and what each one says",
    onPick: (token) => { state.token = token; details(); },
    onHover: (token, event) => { showTip(say(state.stage, token), event); if (state.token !== token) { state.token = token; details(); } },
    onLeave: hideTip,
  });
  const chips = tokenChips($("lens-tokens"), layout, (token) => { state.token = token; details(); });

  function paint() {
    const { stage } = state;
    grid.cells.forEach((cell, patch) => {
      const { index, share } = guess(stage, first + patch);
      const [word] = cell.children;
      word.textContent = emoji(index);
      word.style.opacity = strength(index, share);
      cell.style.backgroundColor = cellColour(stage, first + patch);
      cell.setAttribute("aria-label", `${tokenName(layout, first + patch)}: ${say(stage, first + patch)}`);
    });
    outline(stage);
    chips.forEach((chip, token) => { chip.textContent = `${layout.prefix[token]}: ${called(guess(stage, token).index)} ${percent(guess(stage, token).share)}`; });
    $("stage").textContent = stages[stage];
    $("layer").value = stage;
    $("layer").setAttribute("aria-valuetext", stages[stage]);
    $("ramp").hidden = $("of-label").hidden = state.colour !== "logit";
    strip.forEach(({ button }, i) => button.setAttribute("aria-pressed", i === stage));
    legend(stage);
    details();
  }

  /* Lines between patches that say different things make regions of the ones that agree. */
  function outline(stage) {
    const { columns } = layout;
    const differs = (a, b) => guess(stage, first + a).index !== guess(stage, first + b).index;
    grid.cells.forEach((cell, patch) => {
      const right = (patch + 1) % columns && differs(patch, patch + 1);
      const below = patch + columns < patches && differs(patch, patch + columns);
      cell.style.borderRight = `${right ? 2 : 0}px solid rgb(255 255 255 / .92)`;
      cell.style.borderBottom = `${below ? 2 : 0}px solid rgb(255 255 255 / .92)`;
    });
  }

  function legend(stage) {
    const counts = new Map();
    for (let patch = 0; patch < patches; patch++) {
      const { index } = guess(stage, first + patch);
      counts.set(index, (counts.get(index) ?? 0) + 1);
    }
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    const items = sorted.slice(0, 9).map(([index, count]) =>
      make("li", {}, make("i", { style: { background: rgb(classColour(index)) } }), `${called(index)} `, make("small", { textContent: count })));
    if (sorted.length > 9) items.push(make("li", {}, make("small", { textContent: `and ${sorted.length - 9} more` })));
    $("legend").replaceChildren(...items);
  }

  function details() {
    const { stage, token } = state;
    grid.choose(token);
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", i === token));
    const name = tokenName(layout, token);
    $("patch-title").textContent = `${name[0].toUpperCase()}${name.slice(1)}, ${stages[stage]}`;
    bars($("patch-guesses"), Array.from({ length: guesses }, (_, rank) => guess(stage, token, rank)).map(({ index, logit, share }) =>
      ({ index, share, number: `${percent(share)} · logit ${plain(logit)}` })));
    $("patch-path").replaceChildren(...stages.map((label, i) => {
      const { index, share } = guess(i, token);
      const button = make("button", { type: "button", title: `${label}: ${say(i, token)}`, label: `${label}: ${say(i, token)}`, onclick: () => show(i) },
        make("b", { textContent: emoji(index) }), make("small", { textContent: percent(share) }));
      button.setAttribute("aria-current", i === stage);
      return button;
    }));
  }

  const image = new Image();
  image.src = getComputedStyle(root).getPropertyValue("--image").match(/url\("?([^")]+)"?\)/)[1];
  await image.decode();
  const [across, down] = $("lens-grid").style.aspectRatio.split("/").map(Number);
  const strip = stages.map((label, stage) => {
    const canvas = make("canvas", { width: 360, height: Math.round((360 * down) / across) });
    const button = make("button", { type: "button", label: `The lens ${label}`, onclick: () => show(stage) }, canvas, label);
    return { canvas, button };
  });
  $("strip").append(...strip.map(({ button }) => button));

  function paintStrip() {
    strip.forEach(({ canvas }, stage) => {
      const ink = canvas.getContext("2d");
      const width = canvas.width / layout.columns;
      const height = canvas.height / layout.rows;
      ink.globalAlpha = 1;
      ink.drawImage(image, 0, 0, canvas.width, canvas.height);
      ink.textAlign = "center";
      ink.textBaseline = "middle";
      ink.font = `${Math.min(width, height) * 0.66}px "Apple Color Emoji", "Segoe UI Emoji", "Noto Color Emoji", sans-serif`;
      for (let patch = 0; patch < patches; patch++) {
        const [x, y] = [(patch % layout.columns) * width, Math.floor(patch / layout.columns) * height];
        const { index, share } = guess(stage, first + patch);
        ink.globalAlpha = 1;
        ink.fillStyle = cellColour(stage, first + patch);
        ink.fillRect(x, y, width, height);
        ink.globalAlpha = strength(index, share);
        ink.fillStyle = "#000";
        if (Math.min(width, height) > 14) ink.fillText(emoji(index), x + width / 2, y + height * 0.54);
      }
    });
  }

  function show(stage) {
    state.stage = stage;
    paint();
  }
  function recolour() {
    measure();
    paintStrip();
    paint();
  }

  $("layer").oninput = (event) => { stop(); show(Number(event.target.value)); };
  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "▶";
    $("play").setAttribute("aria-label", "Play through the layers");
  }
  $("play").onclick = () => {
    if (timer) return stop();
    show(state.stage === stages.length - 1 ? 0 : state.stage);
    $("play").textContent = "❚❚";
    $("play").setAttribute("aria-label", "Stop");
    timer = setInterval(() => (state.stage === stages.length - 1 ? stop() : show(state.stage + 1)), 900);
    return undefined;
  };
  document.querySelectorAll("input[name=colour]").forEach((input) => { input.onchange = () => { state.colour = input.value; recolour(); }; });
  $("of").append(make("option", { value: "best", textContent: "each patch's own class" }),
    ...data.shown.map((index, i) => make("option", { value: i, textContent: called(index) })));
  $("of").onchange = (event) => { state.of = event.target.value; recolour(); };
  document.querySelector(".ramp i").style.background = ramp;

  /* Start at the patch that is surest of the model's own answer. */
  const answer = data.top[0][0];
  const sure = (patch) => { const { index, share } = guess(state.stage, first + patch); return index === answer ? 1 + share : share; };
  state.token = first + Array.from({ length: patches }, (_, patch) => patch).reduce((a, b) => (sure(b) > sure(a) ? b : a));
  recolour();
}
