// The atoms panel: which atoms sparse codes use, what they bring back, and one vector atom by atom.
"use strict";

KVLens.atomsPanel = (component) => {
  const { make, setText, units, colours } = KVLens;
  const words = KVLens.text.atoms;
  const sides = KVLens.text.errors;
  const root = component.element.querySelector(".kv-atoms");
  const kind = KVLens.segments([["keys", sides.keys], ["values", sides.values]], words.title, (value) => change({ kind: value }));
  const layer = make("select", { "aria-label": sides.layer, on: { change: () => change({ layer: Number(layer.value) }) } });
  const head = make("select", { "aria-label": sides.head, on: { change: () => change({ head: Number(head.value) }) } });
  const note = make("span");
  const rows = make("div", { class: "kv-atom-lanes" });
  root.append(make("section", { class: "kv-panel kv-panel-atoms" },
    make("header", {}, make("h3", { text: words.title }), make("span", { text: words.subtitle }),
      make("div", { class: "kv-inside" }, note, kind.root, make("label", {}, sides.layer, layer), make("label", {}, sides.head, head))),
    rows));
  let view = null;
  const drawers = new Map();

  function change(part) {
    view = { ...view, ...part };
    component.trigger("select", view);
  }

  function fillSelect(node, count, current) {
    if (node.options.length !== count) {
      node.replaceChildren(...Array.from({ length: count }, (_, index) => make("option", { value: index, text: String(index) })));
    }
    if (document.activeElement !== node) node.value = String(Math.min(current, Math.max(0, count - 1)));
  }

  // --- one lane -----------------------------------------------------------------------------------
  const box = (name) => {
    const title = make("h4", { text: words[name] });
    const plot = make("div", { class: "kv-plot" });
    const told = make("p", { class: "kv-sentence" });
    return { title, plot, told, root: make("div", { class: `kv-atom-figure kv-atom-${name}` }, title, plot, told) };
  };

  function laneDrawer() {
    const [usage, energy, coverage, vector] = ["usage", "energy", "coverage", "vector"].map(box);
    const name = make("b");
    const slider = make("input", { type: "range", "aria-label": words.token, on: { input: () => pickToken(Number(slider.value)) } });
    const token = make("span", { class: "kv-atom-token" });
    const newest = make("button", { type: "button", class: "kv-quiet", text: words.newest, title: words.newest_help, on: { click: () => change({ token: null }) } });
    const steps = make("ol", { class: "kv-atom-steps", title: words.missing_help });
    vector.title.after(make("div", { class: "kv-atom-pick" }, slider, token, newest));
    const body = make("div", { class: "kv-atom-vector-body" });
    vector.plot.replaceWith(body);
    body.append(vector.plot, steps);
    const empty = make("div", { class: "kv-empty" }, make("b", { text: words.none }), make("span", { text: words.none_hint }));
    const figures = make("div", { class: "kv-atom-figures" }, usage.root, energy.root, coverage.root, vector.root);
    const lane = make("div", { class: "kv-atom-lane" }, make("div", { class: "kv-heat-title" }, name), empty, figures);
    let [step, last] = [null, null];

    function pickToken(value) {
      setText(token, KVLens.fill(words.token_number, { n: value }));
      change({ token: value });
    }
    // Keys are drawn solid, values dotted; the side that is chosen is the stronger one.
    const line = (colour, side) => ({ color: view.kind === side ? colour : colours.mix(colour, 0.6), width: view.kind === side ? 2.25 : 1.5, dash: side === "keys" ? "solid" : "dot" });
    const pair = (entries, colour, x, hover) => ["keys", "values"].map((side, index) => ({
      type: "scatter", mode: "lines+markers", x: x(entries[index] || []), y: (entries[index] || []).map((share) => 100 * share),
      name: sides[`${side}_title`], line: line(colour, side), marker: { size: 4 }, hovertemplate: hover, cliponaxis: false,
    }));
    const percents = (extra) => KVLens.plots.axis("", { ticksuffix: " %", nticks: 5, fixedrange: true, ...extra });
    const legend = { showlegend: true, legend: { orientation: "h", x: 1, xanchor: "right", y: 1, yanchor: "bottom", font: { size: 11 } } };
    const margin = { l: 46, r: 12, t: 18, b: 34 };

    function drawUsage(entry, colour) {
      const own = entry.usage;
      const [x, y] = [own.ranks, own.counts].map((packed) => Array.from(KVLens.decode(packed)));
      // The curve falls to the ground where the atoms that are never used begin. A logarithmic axis has no zero to fill to.
      const ground = 0.5;
      const curve = own.used ? [[...x, own.used], [...y, ground]] : [[], []];
      KVLens.plots.draw(usage.plot, [{
        type: "scatter", mode: "lines", x: [0, own.num_atoms], y: [ground, ground], line: { width: 0 }, hoverinfo: "skip",
      }, {
        type: "scatter", mode: "lines", x: curve[0], y: curve[1], line: { color: colour, width: 1.5, shape: "vh" },
        fill: "tonexty", fillcolor: colours.mix(colour, 0.3), hovertemplate: `%{y:.0f} ${words.usage_unit}<extra></extra>`,
      }], KVLens.plots.layout({
        margin, xaxis: KVLens.plots.axis(words.usage_axis, { range: [0, own.num_atoms], nticks: 5, fixedrange: true, showgrid: false }),
        yaxis: KVLens.plots.axis("", { type: "log", range: [Math.log10(ground), Math.log10(Math.max(10, 1.6 * (y[0] || 1)))], dtick: 1, ticksuffix: "×", fixedrange: true }),
      }));
      setText(usage.told, KVLens.fill(words.usage_told, {
        used: units.count(own.used), n: units.count(own.num_atoms), any: units.count(own.used_by_any), dead: units.count(own.num_atoms - own.used_by_any),
      }));
    }
    function drawEnergy(entry, colour) {
      const known = entry.energy.flat().filter((share) => share !== null);
      const floor = Math.max(0, Math.floor(10 * Math.min(1, ...known)) * 10);
      KVLens.plots.draw(energy.plot, pair(entry.energy, colour, (shares) => shares.map((_, index) => index), "%{y:.1f} %"), KVLens.plots.layout({
        margin, ...legend, xaxis: KVLens.plots.axis(words.energy_axis, { nticks: 8, fixedrange: true, showgrid: false, rangemode: "tozero" }),
        yaxis: percents({ range: [known.length ? floor - 2 : 0, 101] }),
      }));
      const [keys, values] = entry.energy.map((shares) => units.percent(shares && shares[shares.length - 1]).replace(" ", "\u00a0"));
      setText(energy.told, !known.length ? words.energy_unknown
        : `${KVLens.fill(words.energy_told, { keys, values })}${entry.has_mean ? ` ${words.energy_mean}` : ""}`);
    }
    function drawCoverage(entry, colour) {
      const top = Math.min(1, 1.25 * Math.max(0.08, ...entry.coverage.flat()));
      KVLens.plots.draw(coverage.plot, pair(entry.coverage, colour, (shares) => shares.map((_, index) => index), "%{y:.1f} %"), KVLens.plots.layout({
        margin, ...legend,
        xaxis: KVLens.plots.axis(words.coverage_axis, { nticks: 8, fixedrange: true, showgrid: false, ...(entry.coverage[0].length <= 12 ? { dtick: 1 } : {}) }),
        yaxis: percents({ range: [0, 102 * top] }),
      }));
      setText(coverage.told, words.coverage_told);
    }

    function drawVector(entry, colour) {
      const own = entry.vector;
      const count = own.sums.s[0];
      const shown = step === null ? count - 1 : Math.min(step, count - 1);
      const width = own.sums.s[1];
      const flat = KVLens.decode(own.sums);
      const sum = (index) => Array.from(flat.subarray(index * width, (index + 1) * width));
      const x = Array.from({ length: width }, (_, index) => index);
      const exact = own.exact && Array.from(KVLens.decode(own.exact));
      const peak = Math.max(...flat.map(Math.abs), ...(exact || []).map(Math.abs));
      const traces = exact ? [{
        type: "scatter", mode: "lines", x, y: exact, name: words.exact, fill: "tozeroy", hovertemplate: "%{y:.2f}",
        line: { color: colours.css("muted"), width: 1, shape: "hvh" }, fillcolor: colours.mix(colours.css("muted"), 0.22),
      }] : [];
      traces.push({
        type: "scatter", mode: "lines", x, y: sum(shown), name: KVLens.fill(words.sum, { n: shown }), hovertemplate: "%{y:.2f}",
        line: { color: colour, width: 2, shape: "hvh" },
      });
      KVLens.plots.draw(vector.plot, traces, KVLens.plots.layout({
        margin, showlegend: true, legend: { ...legend.legend, x: 0, xanchor: "left" }, xaxis: KVLens.plots.axis(words.channel, { range: [-0.5, width - 0.5], nticks: 8, fixedrange: true, showgrid: false }),
        yaxis: KVLens.plots.axis("", { range: [-1.05 * peak, 1.05 * peak], nticks: 5, fixedrange: true }),
      }));
      drawSteps(entry, own, shown);
    }
    function drawSteps(entry, own, shown) {
      const label = (index) => (index === 0 ? words.start[entry.has_mean ? "mean" : "nothing"]
        : KVLens.fill(words.step, { n: own.indices[index - 1], c: units.figures(own.coefficients[index - 1]).replace("-", "−") }));
      const count = own.indices.length + 1;
      if (steps.children.length !== count) {
        steps.replaceChildren(...Array.from({ length: count }, (_, index) => make("li", {}, make("button", {
          type: "button", on: { click: () => { step = index === count - 1 ? null : index; redraw(); } },
        }, make("span"), make("i"), make("small")))));
      }
      [...steps.children].forEach((item, index) => {
        const [name, bar, missing] = item.firstChild.children;
        const share = own.remaining && own.remaining[index];
        item.firstChild.setAttribute("aria-pressed", String(index === shown));
        setText(name, label(index));
        bar.style.setProperty("--share", share === null ? 0 : Math.min(1, share));
        setText(missing, share === null ? "–" : units.percent(share));
      });
      const row = steps.children[shown];
      if (row.offsetTop + row.offsetHeight > steps.offsetTop + steps.offsetHeight && step === null) steps.scrollTop = steps.scrollHeight;
    }

    function redraw() {
      const { payload, entry } = last;
      const run = payload.lanes.find((one) => one.id === entry.id);
      const colour = colours.method(run.method);
      lane.style.setProperty("--lane-colour", colour);
      name.style.color = colour;
      setText(name, run.name);
      empty.classList.toggle("kv-hidden", entry.num_coded > 0);
      figures.classList.toggle("kv-hidden", entry.num_coded === 0);
      if (entry.num_coded === 0) return;
      const own = entry.vector;
      if (document.activeElement !== slider || view.token === null) {
        [slider.min, slider.max, slider.value] = [own.first, own.last, own.token];
      } else [slider.min, slider.max] = [own.first, own.last];
      setText(token, KVLens.fill(words.token_number, { n: own.token }));
      newest.classList.toggle("kv-is-pressed", view.token === null);
      setText(vector.title, KVLens.fill(words.vector, { kind: words.vectors[view.kind] }));
      const isElsewhere = own.asked !== null && own.asked !== own.token;
      setText(vector.told, isElsewhere ? KVLens.fill(words.still_exact, { asked: own.asked })
        : own.exact ? words.click : KVLens.fill(words.unknown, { kind: words.vectors[view.kind] }));
      drawUsage(entry, colour);
      drawEnergy(entry, colour);
      drawCoverage(entry, colour);
      drawVector(entry, colour);
    }
    return { lane, draw(payload, entry) { last = { payload, entry }; redraw(); } };
  }

  // --- all lanes ----------------------------------------------------------------------------------
  let drawn = "";
  KVLens.feed.listen((payload) => {
    const atoms = payload.atoms;
    document.body.classList.toggle("kv-has-atoms", Boolean(atoms));
    if (!atoms) return;
    // Most updates bring new tokens and no new codes: then nothing here is drawn again.
    const now = JSON.stringify([atoms, payload.view, payload.lanes.map((lane) => lane.name), colours.isDark()]);
    if (now === drawn) return;
    drawn = window.Plotly ? now : "";
    view = { ...payload.view, layer: payload.view.layer ?? atoms.probed_layer };
    kind.set(view.kind);
    fillSelect(layer, atoms.num_layers, view.layer);
    fillSelect(head, atoms.num_heads, view.head);
    setText(note, view.layer === atoms.probed_layer ? "" : KVLens.fill(sides.layer_next, { n: view.layer }));
    for (const entry of atoms.lanes) if (!drawers.has(entry.id)) drawers.set(entry.id, laneDrawer());
    const boxes = atoms.lanes.map((entry) => drawers.get(entry.id).lane);
    if (boxes.length !== rows.children.length || boxes.some((one, index) => rows.children[index] !== one)) rows.replaceChildren(...boxes);
    rows.classList.toggle("kv-is-single", boxes.length === 1);
    for (const entry of atoms.lanes) drawers.get(entry.id).draw(payload, entry);
  });
};
