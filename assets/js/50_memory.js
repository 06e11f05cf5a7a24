// The memory panel: parts stacked over tokens, the figures behind them, and what stands beside the cache.
"use strict";

KVLens.memoryPanel = (root) => {
  const { make, setText, units, colours } = KVLens;
  const words = KVLens.text.memory;
  const plot = make("div", { class: "kv-plot kv-plot-memory" });
  const table = make("table", { class: "kv-table" });
  const beside = make("dl", { class: "kv-pairs" });
  const projection = make("table", { class: "kv-table kv-projection" });
  const sentence = make("p", { class: "kv-sentence" });
  root.append(
    make("header", {}, make("h3", { text: words.title }), make("span", { text: words.subtitle })),
    plot,
    make("div", { class: "kv-memory-figures" },
      table,
      make("div", {}, make("h4", { text: words.machine }), beside),
      make("div", {}, make("h4", { text: words.projection }), projection)),
    sentence,
  );

  function drawPlot(payload) {
    const lanes = payload.lanes;
    const traces = [];
    const width = 1 / lanes.length;
    let [start, now, largest] = [Infinity, 0, 0];
    for (const lane of lanes) {
      lane.series = KVLens.decode(lane.memory.tokens);
      if (lane.series.length === 0) continue;
      start = Math.min(start, lane.series[0]);
      now = Math.max(now, lane.series[lane.series.length - 1]);
      lane.bytes = Object.entries(lane.memory.parts).map(([part, packed]) => [part, Array.from(KVLens.decode(packed))]);
      lane.series.forEach((_, index) => { largest = Math.max(largest, lane.bytes.reduce((sum, [, sizes]) => sum + sizes[index], 0)); });
    }
    if (!Number.isFinite(start)) start = 0;
    const end = KVLens.steadyEnd(start, now);
    // A compressed cache may be larger than fp16 while it is short: its tables, the atoms of a prompt.
    const top = Math.max(payload.fp16_bytes_per_token * end, largest) * 1.04;
    const unit = top >= 1e9 ? [1e9, "GB"] : top >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
    const layout = KVLens.plots.layout({ margin: { l: 44, r: 8, t: 24, b: 36 }, annotations: [], hovermode: "x unified" });
    lanes.forEach((lane, index) => {
      const [xaxis, yaxis] = [index ? `x${index + 1}` : "x", "y"];
      const side = [index * width + (index ? 0.02 : 0), (index + 1) * width - (index === lanes.length - 1 ? 0 : 0.02)];
      layout[index ? `xaxis${index + 1}` : "xaxis"] = KVLens.plots.axis(words.tokens, {
        // Long numbers at the end of one lane would run into those at the start of the next.
        domain: side, range: [start, end], nticks: end < 1000 ? 4 : 3, anchor: "y", fixedrange: true,
      });
      const x = Array.from(lane.series);
      for (const [part, sizes] of lane.bytes || []) {
        traces.push({
          type: "scatter", mode: "lines", x, y: sizes.map((size) => size / unit[0]), xaxis, yaxis,
          stackgroup: lane.id, line: { width: 0 }, fillcolor: colours.part(lane.method, part),
          name: KVLens.text.parts[part] || part, hovertemplate: `%{y:.3s} ${unit[1]}`,
        });
      }
      traces.push({
        type: "scatter", mode: "lines", x: [start, end], xaxis, yaxis, hoverinfo: "skip",
        y: [start, end].map((tokens) => (tokens * payload.fp16_bytes_per_token) / unit[0]),
        line: { color: colours.css("ink"), width: 1.25, dash: "dot" },
      });
      layout.annotations.push({
        text: `<b>${KVLens.escape(lane.name)}</b>`, showarrow: false, xref: "paper", yref: "paper", x: side[0], y: 1.0,
        xanchor: "left", yanchor: "bottom", font: { color: colours.method(lane.method), size: 12 },
      });
      layout.annotations.push({
        text: words.fp16, showarrow: false, xref: xaxis, yref: "y", x: end, xanchor: "right", yanchor: "bottom", yshift: 1,
        y: (0.985 * end * payload.fp16_bytes_per_token) / unit[0], font: { size: 10.5, color: colours.css("muted") },
        bgcolor: colours.css("card"), borderpad: 1,
      });
    });
    layout.yaxis = KVLens.plots.axis("", { range: [0, (top * 1.06) / unit[0]], fixedrange: true, ticksuffix: ` ${unit[1]}`, nticks: 5 });
    KVLens.plots.draw(plot, traces, layout);
  }

  function row(cells, options = {}) {
    return make("tr", options, ...cells.map((cell, index) => make(index ? "td" : "th", { text: typeof cell === "string" ? cell : null },
      ...(typeof cell === "string" ? [] : [cell]))));
  }

  function drawTable(payload) {
    const parts = KVLens.partOrder.filter((part) => payload.lanes.some((lane) => lane.memory.last[part]));
    const heads = payload.lanes.map((lane) => make("b", { text: lane.name, style: { color: colours.method(lane.method) } }));
    const rows = [row(["", ...heads], { class: "kv-heads" })];
    for (const part of parts) {
      const owner = payload.lanes.findLast((lane) => lane.memory.last[part]);
      const name = make("span", { title: KVLens.text.part_help[part] },
        make("i", { class: "kv-swatch", style: { background: colours.part(owner.method, part) } }),
        KVLens.text.parts[part] || part);
      rows.push(row([name, ...payload.lanes.map((lane) => (lane.memory.last[part] ? units.bytes(lane.memory.last[part]) : "–"))]));
    }
    rows.push(row([words.total, ...payload.lanes.map((lane) => units.bytes(lane.figures.live_bytes))], { class: "kv-total" }));
    rows.push(row([words.fp16_row, ...payload.lanes.map((lane) => units.bytes(lane.figures.fp16_bytes))]));
    rows.push(row([words.reserved, ...payload.lanes.map((lane) => units.bytes(lane.figures.reserved_bytes))]));
    const probed = payload.lanes.reduce((sum, lane) => sum + lane.figures.probe_bytes, 0);
    table.replaceChildren(...rows);
    table.title = probed ? KVLens.fill(words.probe, { bytes: units.bytes(probed) }) : "";
  }

  function drawBeside(payload) {
    const machine = payload.machine;
    const pairs = [[words.process, units.bytes(machine.process_bytes)], [words.weights, units.bytes(payload.weight_bytes)]];
    if (machine.device_allocated_bytes === null) pairs.push([words.device, words.no_device]);
    else {
      pairs.push([words.allocated, units.bytes(machine.device_allocated_bytes)], [words.peak, units.bytes(machine.device_peak_bytes)]);
      if (machine.device_used_bytes !== null) {
        const used = units.bytes(machine.device_used_bytes);
        pairs.push([words.used, KVLens.fill(words.of, { used, total: units.bytes(machine.device_total_bytes) })]);
      }
    }
    for (const lane of payload.lanes.filter((one) => one.figures.shared_bytes)) {
      const value = units.bytes(lane.figures.shared_bytes);
      if (!pairs.some(([name, told]) => name === words.shared && told === value)) pairs.push([words.shared, value]);
    }
    beside.replaceChildren(...pairs.flatMap(([name, value]) => (name === words.shared
      ? [make("dt", { text: name, title: words.shared_help }, make("small", { text: words.shared_note })), make("dd", { text: value })]
      : [make("dt", { text: name }), make("dd", { text: value })])));
  }

  function drawProjection(payload) {
    const rows = payload.projection.map(([tokens, sizes]) => row([
      KVLens.fill(words.at_tokens, { n: units.context(tokens) }),
      ...payload.lanes.map((lane) => {
        const ratio = sizes[lane.id] ? sizes.fp16 / sizes[lane.id] : null;
        const cell = make("span", { text: units.bytes(sizes[lane.id]) });
        if (ratio && lane.method !== "dense") {
          cell.append(make("small", { text: ` ${ratio < 1 ? units.saving(ratio) : `${units.figures(ratio)}×`}` }));
        }
        return cell;
      }),
    ]));
    projection.replaceChildren(...rows);
  }

  return (payload) => {
    if (!payload.lanes) return;
    drawPlot(payload);
    drawTable(payload);
    drawBeside(payload);
    drawProjection(payload);
    setText(sentence, payload.sentence);
  };
};
