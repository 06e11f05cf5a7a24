// The error panel: where in the cache the packed form differs from the exact one.
"use strict";

KVLens.errorPanel = (root, select) => {
  const { make, setText, units, colours } = KVLens;
  const words = KVLens.text.errors;
  const kind = KVLens.segments([["keys", words.keys], ["values", words.values]], words.title, (value) => change({ kind: value }));
  const figure = KVLens.segments(Object.entries(words.figures), words.subtitle, (value) => change({ figure: value }));
  const quantity = KVLens.segments(Object.entries(words.quantities), words.quantities.magnitude, (value) => change({ quantity: value }));
  const layer = make("select", { "aria-label": words.layer, on: { change: () => change({ layer: Number(layer.value) }) } });
  const head = make("select", { "aria-label": words.head, on: { change: () => change({ head: Number(head.value) }) } });
  const inside = make("div", { class: "kv-inside" }, quantity.root,
    make("label", {}, words.layer, layer), make("label", {}, words.head, head));
  const plots = make("div", { class: "kv-heatmaps" });
  const empty = make("div", { class: "kv-empty" }, make("b", { text: words.none }), make("span", { text: words.none_hint }));
  const bar = make("div", { class: "kv-scale" });
  const note = make("p", { class: "kv-sentence" });
  root.append(
    make("header", {}, make("h3", { text: words.title }), make("span", { text: words.subtitle })),
    make("div", { class: "kv-toolbar" }, kind.root, figure.root), inside, plots, empty, bar, note,
  );
  let view = null;
  const charts = new Map();

  function change(part) {
    view = { ...view, ...part };
    select(view);
  }

  function fillSelect(node, count, current) {
    if (node.options.length !== count) {
      node.replaceChildren(...Array.from({ length: count }, (_, index) => make("option", { value: index, text: String(index) })));
    }
    if (document.activeElement !== node) node.value = String(Math.min(current, Math.max(0, count - 1)));
  }

  function chart(lane) {
    if (!charts.has(lane.id)) {
      const title = make("div", { class: "kv-heat-title" });
      const node = make("div", { class: "kv-plot" });
      charts.set(lane.id, { title, node, box: make("div", { class: "kv-heatmap" }, title, node) });
    }
    return charts.get(lane.id);
  }

  function drawScale(payload, label) {
    const stops = colours.heat().map(([at, colour]) => `${colour} ${100 * at}%`).join(",");
    bar.replaceChildren(
      make("span", { text: label }), make("span", { text: "0" }),
      make("i", { class: "kv-ramp", style: { background: `linear-gradient(90deg,${stops})` } }),
      make("span", { text: payload.errors.top >= 10 ? units.count(payload.errors.top) : String(payload.errors.top) }),
      make("i", { class: "kv-swatch kv-exact-cell" }), make("span", { text: words.exact }),
    );
  }

  function drawHeat(payload, entry) {
    const lane = payload.lanes.find((one) => one.id === entry.id);
    const { title, node } = chart(entry);
    const mean = entry.means[view.kind === "keys" ? 0 : 1];
    title.replaceChildren(
      make("b", { text: lane.name, style: { color: colours.method(lane.method) } }),
      make("span", { text: `${words[`${view.kind}_title`]}, ${KVLens.fill(words.mean, { error: units.percent(mean) })}` }),
      make("span", { text: entry.column_tokens > 1 ? KVLens.fill(words.pooled, { n: entry.column_tokens }) : "" }));
    const grid = KVLens.decodeCells(entry.cells, payload.errors.top);
    const isHead = view.figure === "heads";
    const rowName = view.figure === "channels" ? words.channel : words.layer.toLowerCase();
    const unit = view.figure === "channels" ? words.quantity_axis[view.quantity] : words.relative;
    const trace = {
      type: "heatmap", z: grid, x0: 0, dx: entry.column_tokens, y0: 0, dy: 1, zmin: 0, zmax: payload.errors.top,
      colorscale: colours.heat(), showscale: false, hoverongaps: false, xgap: isHead ? 2 : 0, ygap: isHead ? 2 : 0,
      hovertemplate: `${rowName} %{y} · ${words.axis[view.figure]} %{x}<br>${unit} %{z:.3f}<extra></extra>`,
    };
    const drawn = KVLens.plots.draw(node, [trace], KVLens.plots.layout({
      uirevision: view.figure, hovermode: "closest", plot_bgcolor: colours.css("exact-cell"),
      margin: { l: 40, r: 8, t: 4, b: 34 },
      xaxis: KVLens.plots.axis(words.axis[view.figure], { showgrid: false, ...(isHead ? { dtick: 1 } : { nticks: 6 }) }),
      yaxis: KVLens.plots.axis(rowName, { showgrid: false, nticks: 6, ...(grid.length <= 12 ? { dtick: 1 } : {}) }),
    }));
    drawn.then(() => {
      if (!node.on || node.dataset.isHeard) return;
      node.dataset.isHeard = "yes";
      node.on("plotly_click", ({ points }) => pick(points[0].x));
    });
  }

  // A token that is clicked on is taken apart in the atoms panel, where there is one.
  function pick(token) {
    if (KVLens.feed.latest.atoms && view.figure !== "heads") change({ token: Math.round(token) });
  }

  return (payload) => {
    if (!payload.lanes) return;
    const errors = payload.errors;
    view = { ...payload.view, layer: payload.view.layer ?? errors.probed_layer ?? 0 };
    kind.set(view.kind);
    figure.set(view.figure);
    quantity.set(view.quantity);
    inside.classList.toggle("kv-hidden", view.figure !== "channels");
    fillSelect(layer, errors.num_layers || 0, view.layer);
    fillSelect(head, errors.num_heads || 0, view.head);
    const shown = errors.lanes.filter((entry) => entry.cells);
    const isBlank = shown.length === 0 || shown.every((entry) => entry.means.every((mean) => mean === null)
      && !(view.figure === "channels" && view.quantity === "magnitude"));
    empty.classList.toggle("kv-hidden", !isBlank);
    plots.classList.toggle("kv-hidden", isBlank);
    setText(empty.firstChild, errors.lanes.length && shown.length === 0 ? words.no_probe : words.none);
    if (!isBlank) {
      const boxes = shown.map((entry) => chart(entry).box);
      if (boxes.length !== plots.children.length || boxes.some((box, index) => plots.children[index] !== box)) plots.replaceChildren(...boxes);
      for (const entry of shown) drawHeat(payload, entry);
    }
    drawScale(payload, view.figure === "channels" ? words.quantity_axis[view.quantity] : words.relative);
    const hints = [];
    if (view.figure === "channels" && errors.probed_layer !== null && view.layer !== errors.probed_layer) {
      hints.push(KVLens.fill(words.layer_next, { n: view.layer }));
    } else if (view.figure === "channels" && view.quantity === "magnitude") hints.push(view.kind === "keys" ? words.outliers : words.value_note);
    setText(note, hints.join(" · "));
  };
};
