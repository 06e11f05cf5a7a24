// The throughput lab's figures: a grid a method, three charts, a table. Every one says what was not measured.
"use strict";

KVLens.labFigures = ({ onSave }) => {
  const { make, setText, units, colours } = KVLens;
  const words = KVLens.text.lab;
  const LEGEND = { showlegend: true, legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", font: { size: 11 } } };
  const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "star"];
  // A context and a batch that nobody picked move on with the measurement.
  const view = { quantity: "tokens_per_second", context: null, batch: null, picked: { context: null, batch: null } };
  let run = null;

  // --- boxes --------------------------------------------------------------------------------------
  const panel = (name, title, ...tools) => {
    const box = make("section", { class: `kv-panel kv-lab-${name}` }, make("header", {}, make("h3", { text: title }), ...tools));
    return box;
  };
  const save = make("button", { type: "button", class: "kv-quiet kv-lab-save", text: words.save, on: { click: onSave } });
  const conditions = make("p", { class: "kv-lab-conditions" });
  const findings = make("ul", { class: "kv-lab-findings" });
  const quantity = KVLens.segments(Object.entries(words.quantities), words.grid, (name) => { view.quantity = name; draw(); });
  const grids = make("div", { class: "kv-lab-grids" });
  const scope = make("p", { class: "kv-lab-scope" });
  const grid = panel("grid", words.grid, make("span", { text: words.grid_subtitle }), quantity.root, save);
  grid.append(scope, findings, grids, conditions);

  function chart(name, title, note) {
    const pick = make("div", { class: "kv-lab-pick" });
    const plot = make("div", { class: "kv-plot kv-lab-plot" });
    const box = panel(name, title, pick);
    box.append(plot, make("p", { class: "kv-sentence", text: note }));
    return { box, pick, plot };
  }
  const overBatch = chart("over-batch", words.over_batch, `${words.spread} · ${words.out_of_budget}`);
  const overContext = chart("over-context", words.over_context, `${words.spread} · ${words.out_of_budget}`);
  const overTokens = chart("over-tokens", words.over_tokens, words.formula);
  const charts = make("div", { class: "kv-lab-charts" }, overBatch.box, overContext.box, overTokens.box);

  const table = make("table", { class: "kv-table kv-lab-table" });
  const details = make("details", { class: "kv-panel kv-lab-details" }, make("summary", { text: words.table }), make("div", { class: "kv-lab-scroll" }, table));
  const empty = make("div", { class: "kv-empty" }, make("b", { text: words.empty }), make("span", { text: words.empty_hint }));
  const how = make("details", { class: "kv-panel kv-lab-details" }, make("summary", { text: words.how_title }));
  const body = make("div", { class: "kv-lab-body" }, grid, charts, details);
  const root = make("div", { class: "kv-lab-results" }, empty, body, how);

  // --- what there is ------------------------------------------------------------------------------
  const isAttention = () => run.scope === "attention";
  const cellAt = (method, context, batch) => run.cells.find((cell) =>
    cell.method === method && cell.context_tokens === context && cell.batch_size === batch);
  const name = (index) => run.methods[index].label;
  const colour = (index) => colours.method(run.methods[index].method);
  const twin = (index) => run.methods.slice(0, index).filter((other) => other.method === run.methods[index].method).length;
  const dash = (index) => DASHES[twin(index) % DASHES.length];
  const symbol = (index) => SYMBOLS[twin(index) % SYMBOLS.length];

  function valueOf(cell) {
    if (view.quantity !== "ratio") return cell[view.quantity];
    const exact = run.methods.findIndex((method) => method.method === "dense");
    const rival = exact < 0 ? null : cellAt(exact, cell.context_tokens, cell.batch_size);
    return rival?.tokens_per_second && cell.tokens_per_second ? cell.tokens_per_second / rival.tokens_per_second : null;
  }
  function written(value) {
    if (value === null) return "–";
    if (view.quantity === "kv_bytes") return units.bytes(value);
    if (view.quantity === "ratio") return `${units.figures(value)}×`;
    return value >= 1000 ? units.count(Math.round(value)) : units.figures(value);
  }

  // --- the grids ----------------------------------------------------------------------------------
  function drawGrids() {
    const values = run.cells.filter((cell) => cell.status === "measured").map(valueOf).filter((value) => value !== null);
    const top = Math.max(...values, 1e-9);
    grids.replaceChildren(...run.methods.map((method, index) => {
      const head = make("div", { class: "kv-lab-head" }, make("i", { class: "kv-dot" }), make("b", { text: method.label }),
        make("small", { text: method.most_tokens === null ? "" : KVLens.fill(words.fits, { n: units.count(method.most_tokens) }), title: words.fits_help }));
      const heads = make("tr", {}, make("th", { text: "" }), ...run.batch_sizes.map((batch) => make("th", { scope: "col", text: `× ${batch}` })));
      const rows = run.contexts.map((context) => make("tr", {}, make("th", { scope: "row", text: units.context(context) }),
        ...run.batch_sizes.map((batch) => gridCell(index, context, batch, top))));
      const own = run.cells.filter((cell) => cell.method === index);
      const isRefused = own.length > 0 && own.every((cell) => cell.status === "not served");
      const shown = isRefused ? make("p", { class: "kv-lab-refused", text: [...new Set(own.map((cell) => cell.note))].join(" ") }) : make("table", {}, heads, ...rows);
      return make("div", { class: "kv-lab-one", style: { "--lane-colour": `var(--kv-method-${method.method})` } }, head, shown);
    }));
  }
  function gridCell(index, context, batch, top) {
    const cell = cellAt(index, context, batch);
    if (!cell) return make("td", { class: "kv-lab-pending" });
    if (cell.status === "measured") {
      const value = valueOf(cell);
      const title = `${units.figures(cell.step_ms)} ms (${units.figures(cell.step_ms_low)}–${units.figures(cell.step_ms_high)}) · ${units.bytes(cell.kv_bytes)} KV`;
      return make("td", { text: written(value), title, style: { background: colours.mix(colour(index), 0.06 + 0.44 * ((value ?? 0) / top)) } });
    }
    if (cell.status === "over budget") {
      const bytes = units.bytes(cell.kv_bytes);
      const title = KVLens.fill(words.over_help, { label: name(index), context: units.context(context), batch, bytes, limit: units.bytes(run.limit_bytes) });
      return make("td", { class: "kv-lab-over", title: cell.note || title }, make("span", { text: words.over }), make("small", { text: KVLens.fill(words.over_cell, { bytes }) }));
    }
    return make("td", { class: "kv-lab-out", text: cell.status === "skipped" ? words.skipped : words.not_served, title: cell.note });
  }

  // --- the charts ---------------------------------------------------------------------------------
  // Draws come four times a second while it measures: the buttons stay the same ones, or a press and the focus would be lost.
  function picker(chart, label, numbers, current, show, pick) {
    const offered = numbers.join();
    if (chart.offered !== offered) {
      chart.offered = offered;
      chart.choice = KVLens.segments(numbers.map((number) => [number, show(number)]), label, pick);
      chart.pick.replaceChildren(make("span", { text: label }), chart.choice.root);
    }
    chart.choice.set(current);
  }
  const logAxis = (title, numbers, show, ticks = numbers) => KVLens.plots.axis(title, {
    type: "log", tickvals: ticks, ticktext: ticks.map(show), fixedrange: true,
    range: [Math.log10(numbers[0] / 1.35), Math.log10(numbers[numbers.length - 1] * 1.35)],
  });

  // Lines of measured cells over `numbers`, and below them a cross wherever a cell does not fit the budget.
  function lines(plot, { numbers, pick, value, low, high, xaxis, title, unit }) {
    const traces = [];
    let [bottom, top] = [Infinity, 0];
    run.methods.forEach((_, index) => {
      const cells = numbers.map((number) => pick(index, number)).filter((cell) => cell?.status === "measured");
      bottom = Math.min(bottom, ...cells.map(low));
      top = Math.max(top, ...cells.map(high));
      traces.push({
        type: "scatter", mode: "lines+markers", name: KVLens.escape(name(index)), x: cells.map(xaxis.of), y: cells.map(value),
        line: { color: colour(index), width: 2, dash: dash(index) }, marker: { size: 7, symbol: symbol(index), color: colour(index) },
        error_y: { type: "data", symmetric: false, array: cells.map((cell) => high(cell) - value(cell)), arrayminus: cells.map((cell) => value(cell) - low(cell)), thickness: 1, width: 3, color: colour(index) },
        hovertemplate: `%{y:,.4~g} ${unit}`,
      });
    });
    // Methods that lie far apart share an axis that shows them all.
    const isWide = top > 25 * bottom;
    top = top || 1;
    const [start, end] = isWide ? [Math.log10(bottom / 2.2), Math.log10(top * 1.5)] : [0, top * 1.12];
    const level = (share) => (isWide ? 10 ** (start + share * (end - start)) : share * end);
    const marks = new Map();
    run.methods.forEach((_, index) => {
      const cells = numbers.map((number) => pick(index, number)).filter((cell) => cell?.status === "over budget");
      const place = (cell) => { const count = marks.get(xaxis.of(cell)) || 0; marks.set(xaxis.of(cell), count + 1); return level(0.05 + 0.07 * count); };
      traces.push({
        type: "scatter", mode: "markers", name: KVLens.escape(name(index)), x: cells.map(xaxis.of), y: cells.map(place),
        marker: { symbol: "x", size: 10, color: colour(index) }, text: cells.map((cell) => `${words.over}: ${units.bytes(cell.kv_bytes)}`), hovertemplate: "%{text}", showlegend: false,
      });
    });
    KVLens.plots.draw(plot, traces, KVLens.plots.layout({
      margin: { l: 52, r: 12, t: 30, b: 40 }, ...LEGEND,
      xaxis: logAxis(xaxis.title, numbers, xaxis.show),
      yaxis: KVLens.plots.axis(title + (isAttention() ? words.attention_suffix : ""), {
        type: isWide ? "log" : "linear", range: [start, end], nticks: 6, fixedrange: true,
      }),
    }));
  }

  function drawBytes() {
    const tokens = (cell) => cell.context_tokens * cell.batch_size;
    const cells = run.cells.filter((cell) => cell.kv_bytes);
    if (!cells.length) return;
    const all = [...new Set(run.contexts.flatMap((context) => run.batch_sizes.map((batch) => context * batch)))].sort((a, b) => a - b);
    const shown = all.filter((_, index) => index % Math.ceil(all.length / 6) === 0);
    const traces = run.methods.map((_, index) => {
      const own = cells.filter((cell) => cell.method === index).sort((left, right) => tokens(left) - tokens(right));
      return {
        type: "scatter", mode: "markers", name: KVLens.escape(name(index)), x: own.map(tokens), y: own.map((cell) => cell.kv_bytes),
        marker: { size: 8, color: colour(index), line: { width: 1.5, color: colour(index) }, symbol: own.map((cell) => symbol(index) + (cell.status === "measured" ? "" : "-open")) },
        text: own.map((cell) => `${units.context(cell.context_tokens)} × ${cell.batch_size}: ${units.bytes(cell.kv_bytes)}`), hovertemplate: "%{text}",
      };
    });
    const sizes = [...cells.map((cell) => cell.kv_bytes), run.limit_bytes];
    const range = [Math.log10(Math.min(...sizes) / 1.6), Math.log10(Math.max(...sizes) * 1.9)];
    const ticks = [];
    for (let power = Math.ceil(range[0]); power <= range[1]; power += 1) ticks.push(10 ** power);
    const ink = colours.css("ink");
    KVLens.plots.draw(overTokens.plot, traces, KVLens.plots.layout({
      margin: { l: 56, r: 12, t: 30, b: 40 }, hovermode: "closest", ...LEGEND,
      xaxis: logAxis(words.tokens_axis, all, units.context, shown),
      yaxis: KVLens.plots.axis("", { type: "log", range, tickvals: ticks, ticktext: ticks.map((bytes) => units.bytes(bytes).replace(/\.0+ /, " ")), fixedrange: true }),
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: run.limit_bytes, y1: run.limit_bytes, line: { color: ink, width: 1.25, dash: "dot" } }],
      annotations: [{ text: `${words.budget_line} ${units.bytes(run.limit_bytes)}`, showarrow: false, xref: "paper", x: 0, xanchor: "left", y: Math.log10(run.limit_bytes), yanchor: "bottom", font: { size: 10.5, color: colours.css("muted") } }],
    }));
  }

  function drawCharts() {
    picker(overBatch, words.at_context, run.contexts, view.context, units.context, (context) => { view.picked.context = context; draw(); });
    picker(overContext, words.at_batch, run.batch_sizes, view.batch, String, (batch) => { view.picked.batch = batch; draw(); });
    lines(overBatch.plot, {
      numbers: run.batch_sizes, pick: (index, batch) => cellAt(index, view.context, batch), title: words.speed_axis, unit: "tok/s",
      value: (cell) => cell.tokens_per_second, low: (cell) => (1000 * cell.batch_size) / cell.step_ms_high, high: (cell) => (1000 * cell.batch_size) / cell.step_ms_low,
      xaxis: { title: words.batch_axis, of: (cell) => cell.batch_size, show: String },
    });
    lines(overContext.plot, {
      numbers: run.contexts, pick: (index, context) => cellAt(index, context, view.batch), title: words.step_axis, unit: "ms",
      value: (cell) => cell.step_ms, low: (cell) => cell.step_ms_low, high: (cell) => cell.step_ms_high,
      xaxis: { title: words.context_axis, of: (cell) => cell.context_tokens, show: units.context },
    });
    drawBytes();
  }

  // --- the table ----------------------------------------------------------------------------------
  function drawTable() {
    const columns = Object.keys(words.columns).filter((column) => column !== "device_peak_bytes" || run.cells.some((cell) => cell.device_peak_bytes));
    const shown = {
      label: (cell) => make("b", { text: name(cell.method), style: { color: colour(cell.method) } }),
      context_tokens: (cell) => units.count(cell.context_tokens),
      tokens_per_second: (cell) => units.figures(cell.tokens_per_second, 4),
      step_ms: (cell) => units.figures(cell.step_ms),
      spread: (cell) => (cell.step_ms === null ? "–" : `${units.figures(cell.step_ms_low)}–${units.figures(cell.step_ms_high)}`),
      kv_bytes: (cell) => units.bytes(cell.kv_bytes), allocated_bytes: (cell) => units.bytes(cell.allocated_bytes), device_peak_bytes: (cell) => units.bytes(cell.device_peak_bytes),
      num_steps: (cell) => `${cell.num_steps || "–"}`,
      note: (cell) => (cell.status === "measured" ? (isAttention() ? KVLens.fill(words.attention_only, { measured: cell.measured_layers, layers: run.num_layers }) : "")
        : [words[{ "over budget": "over", "not served": "not_served", skipped: "skipped" }[cell.status]], cell.note].filter(Boolean).join(": ")),
    };
    table.replaceChildren(
      make("tr", { class: "kv-heads" }, ...columns.map((column) => make("th", { scope: "col", text: words.columns[column] }))),
      ...run.cells.map((cell) => make("tr", {}, ...columns.map((column) => make("td", {}, shown[column] ? shown[column](cell) : `${cell[column] ?? "–"}`)))));
  }

  function draw() {
    const hasCells = Boolean(run && run.cells.length);
    empty.hidden = hasCells;
    body.hidden = !hasCells;
    if (!hasCells) return;
    const reached = (column) => Math.max(...run.cells.filter((cell) => cell.status === "measured").map((cell) => cell[column]));
    const pick = (picked, offered, column) => (offered.includes(picked) ? picked : offered.includes(reached(column)) ? reached(column) : offered[0]);
    view.context = pick(view.picked.context, run.contexts, "context_tokens");
    view.batch = pick(view.picked.batch, run.batch_sizes, "batch_size");
    quantity.set(view.quantity);
    const layers = [...new Set(run.cells.map((cell) => cell.measured_layers).filter(Boolean))].sort((a, b) => a - b);
    setText(scope, isAttention() && layers.length ? KVLens.fill(words.attention_only, { measured: layers.length > 1 ? `${layers[0]}–${layers[layers.length - 1]}` : layers[0], layers: run.num_layers }) : "");
    findings.replaceChildren(...run.findings.map((text) => make("li", { text })));
    const given = run.conditions;
    setText(conditions, given.device ? KVLens.fill(words.conditions, { subject: run.subject, budget: units.bytes(run.limit_bytes), ...given }) : "");
    drawGrids();
    drawCharts();
    if (details.open) drawTable();
  }
  details.addEventListener("toggle", () => { if (details.open && run) drawTable(); });

  let isQueued = false;
  function queue() {
    if (isQueued) return;
    isQueued = true;
    requestAnimationFrame(() => { isQueued = false; draw(); });
  }
  new MutationObserver(queue).observe(document.body, { attributeFilter: ["class"] });
  KVLens.plots.whenReady.then(queue);
  return {
    root,
    receive(payload, steps) {
      if (payload.run) {
        run = { ...payload.run };
        run.cells = run.cells.map((row) => Object.fromEntries(run.columns.map((column, index) => [column, row[index]])));
      }
      if (steps && how.children.length === 1) how.append(...words.how.map((text) => make("p", { text: KVLens.fill(text, steps) })));
      queue();
    },
  };
};

KVLens.lab = (component) => {
  const controls = KVLens.labControls({ onMeasure: (plan) => component.trigger("measure", plan), onStop: () => component.trigger("stop") });
  const figures = KVLens.labFigures({ onSave: () => component.trigger("save") });
  component.element.querySelector(".kv-lab").append(controls.root, figures.root);
  KVLens.follow(component, (text) => {
    if (!text) return;
    const payload = JSON.parse(text);
    KVLens.lab.latest = payload;
    controls.receive(payload);
    figures.receive(payload, controls.steps);
  });
};
