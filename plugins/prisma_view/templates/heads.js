const share = (value, most) => Math.sign(value) * Math.sqrt(Math.abs(value) / Math.max(most, 1e-9));

if (data.layers) {
  const { labels, values, constant, rest } = data.layers;
  const every = data.heads?.values;
  const cells = every && layerHeadTable($("head-pieces"), every.length, every[0].length, "table", (layer, head) => {
    const cell = make("button", { type: "button", className: "value" });
    cell.onclick = cell.onmouseenter = cell.onfocus = () => tell(layer, head);
    return cell;
  });
  let shown = 0;

  function tell(layer, head) {
    const name = className(data.shown[shown]);
    const value = every[layer][head][shown];
    $("head-words").textContent = `Block ${layer}, head ${head} writes ${signed(value, 2)} ${value < 0 ? "against" : "for"} “${name}”. `
      + `All heads together write ${signed(every.flat().reduce((sum, one) => sum + one[shown], 0))}, everything else ${signed(data.heads.rest[shown])}.`;
  }

  function piece(label, value, most, kind = "") {
    const width = `${(50 * Math.abs(value)) / most}%`;
    const bar = make("i", { style: { background: `var(--${value < 0 ? "less" : "more"})`, width, left: value < 0 ? `calc(50% - ${width})` : "50%" } });
    return make("div", { className: `piece ${kind}`, role: "listitem" }, make("span", { textContent: label }),
      make("span", { className: "track" }, bar), make("span", { className: "number", textContent: kind ? plain(value, digitsFor(most)) : signed(value, digitsFor(most)) }));
  }

  function choose(i) {
    shown = i;
    chips.forEach((chip, at) => { chip.setAttribute("aria-checked", at === i); chip.tabIndex = at === i ? 0 : -1; });
    const parts = values.map((row) => row[i]);
    const total = parts.reduce((a, b) => a + b, 0) + constant[i];
    const most = Math.max(...parts.map(Math.abs), Math.abs(constant[i]), Math.abs(total), 1e-9);
    $("layers").replaceChildren(...parts.map((value, at) => piece(labels[at], value, most)), piece(rest, constant[i], most),
      piece(`logit of ${emoji(data.shown[i])}`, total, most, "sum"));
    $("layers-words").textContent = `The pieces add up to the logit of “${className(data.shown[i])}”, ${plain(total, 2)}.`;
    if (!cells) return;
    const flat = every.flat().map((row) => row[i]);
    const largest = Math.max(...flat.map(Math.abs));
    const best = flat.indexOf(Math.max(...flat));
    cells.forEach((cell, at) => {
      const [layer, head] = [Math.floor(at / every[0].length), at % every[0].length];
      cell.style.background = diverging(share(flat[at], largest));
      cell.textContent = every[0].length <= 8 ? signed(flat[at], digitsFor(largest)) : "";
      cell.classList.toggle("strong", Math.abs(share(flat[at], largest)) > 0.75);
      cell.classList.toggle("best", at === best);
      cell.setAttribute("aria-label", `Block ${layer}, head ${head}: ${signed(flat[at], 2)}`);
    });
    tell(Math.floor(best / every[0].length), best % every[0].length);
  }

  const chips = data.shown.map((index, i) => make("button", { type: "button", className: "chip", role: "radio", textContent: `${called(index)}  ${plain(data.logits[i])}`, onclick: () => choose(i) }));
  $("attribution-classes").append(...chips);
  $("attribution-classes").onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose((shown + step + chips.length) % chips.length);
    chips[shown].focus();
  };
  choose(0);
}

if (data.patching) {
  const { kept, put, before, other, change, guess } = data.patching;
  const [layers, heads] = [change.all.length, change.all[0].length];
  let where = "all";
  const cells = layerHeadTable($("patches"), layers, heads, "table", (layer, head) => {
    const cell = make("button", { type: "button", className: "value" });
    cell.onclick = cell.onmouseenter = cell.onfocus = () => tell(layer, head);
    return cell;
  });
  const lead = (value) => (value < 0 ? `${called(put)} leads ${called(kept)} by ${plain(-value)}` : `${called(kept)} leads ${called(put)} by ${plain(value)}`);
  $("kept").textContent = `First image: ${lead(before)}`;
  $("put").textContent = `Second image: ${lead(other)}`;

  function tell(layer, head) {
    const value = change[where][layer][head];
    $("patches-words").textContent = `Block ${layer}, head ${head}: the lead changes by ${signed(value, 2)}, to ${plain(before + value)}; the model says ${called(guess[where][layer][head])}.`;
  }

  function paint() {
    const flat = change[where].flat();
    const largest = Math.max(...flat.map(Math.abs));
    const best = flat.findIndex((value) => Math.abs(value) === largest);
    cells.forEach((cell, at) => {
      const [layer, head] = [Math.floor(at / heads), at % heads];
      const said = guess[where][layer][head];
      cell.style.background = diverging(share(flat[at], largest));
      cell.replaceChildren(...(said === data.top[0][0] ? [] : [make("b", { textContent: emoji(said) })]), heads <= 8 ? signed(flat[at], digitsFor(largest)) : "");
      cell.classList.toggle("best", at === best);
      cell.classList.toggle("strong", Math.abs(share(flat[at], largest)) > 0.75);
      cell.setAttribute("aria-label", `Block ${layer}, head ${head}: ${signed(flat[at], 2)}, the model says ${className(said)}`);
    });
    document.querySelectorAll(".words[data-where]").forEach((words) => { words.hidden = words.dataset.where !== where; });
    tell(Math.floor(best / heads), best % heads);
  }
  document.querySelectorAll("input[name=where]").forEach((input) => { input.onchange = () => { where = input.value; paint(); }; });
  paint();
}
