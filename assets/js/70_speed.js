// The speed panel: each lane's own tokens/s, prefill and decode apart.
"use strict";

KVLens.speedPanel = (root) => {
  const { make, setText, units, colours } = KVLens;
  const words = KVLens.text.speed;
  const plot = make("div", { class: "kv-plot kv-plot-speed" });
  const table = make("table", { class: "kv-table kv-speeds" });
  const note = make("p", { class: "kv-sentence" });
  root.append(
    make("header", {}, make("h3", { text: words.title }), make("span", { text: words.subtitle })),
    table, plot, note,
  );

  function drawTable(payload) {
    const cell = (value, unit = "") => make("td", {}, make("b", { text: value }), make("small", { text: ` ${unit}` }));
    const head = make("tr", { class: "kv-heads" }, make("th"), ...[words.decode, words.prefill, words.first].map((text) => make("td", { text })));
    const rows = payload.lanes.map((lane) => make("tr", {},
      make("th", {}, make("b", { text: lane.name, style: { color: colours.method(lane.method) } })),
      cell(units.figures(lane.figures.tokens_per_second), "tok/s"),
      cell(units.figures(lane.figures.prefill_tokens_per_second), "tok/s"),
      cell(...units.duration(lane.figures.first_token_ms).split(" "))));
    table.replaceChildren(head, ...rows);
  }

  // A second lane of the same method has the same colour: its line is dotted.
  const isTwin = (lanes, index) => lanes.slice(0, index).some((other) => other.method === lanes[index].method);

  function drawPlot(payload) {
    let end = 16;
    const all = [];
    const traces = payload.lanes.map((lane, index) => {
      const x = Array.from(KVLens.decode(lane.speed.tokens));
      const y = Array.from(KVLens.decode(lane.speed.speed));
      end = Math.max(end, KVLens.steadyEnd(0, x[x.length - 1] || 0));
      all.push(...y);
      return {
        type: "scatter", mode: x.length < 16 ? "lines+markers" : "lines", x, y, name: KVLens.escape(lane.name), hovertemplate: "%{y:.1f} tok/s",
        line: { color: colours.method(lane.method), width: 2, dash: isTwin(payload.lanes, index) ? "dot" : "solid" },
      };
    });
    // A rare hiccup of the clock must not flatten the curve: the axis ends above what nearly all blocks reach.
    const top = all.sort((left, right) => left - right)[Math.floor(0.95 * (all.length - 1))] || 10;
    const step = Math.pow(10, Math.floor(Math.log10(top)));
    const ceiling = Math.ceil((1.25 * top) / step) * step;
    KVLens.plots.draw(plot, traces, KVLens.plots.layout({
      margin: { l: 44, r: 10, t: 8, b: 36 },
      xaxis: KVLens.plots.axis(words.token, { range: [0, end], nticks: 6, fixedrange: true }),
      yaxis: KVLens.plots.axis(words.tokens_per_second, { range: [0, ceiling], nticks: 5, fixedrange: true }),
    }));
  }

  return (payload) => {
    if (!payload.lanes) return;
    drawTable(payload);
    drawPlot(payload);
    const paths = [...new Set(payload.lanes.map((lane) => lane.path).filter(Boolean))];
    const path = paths.length ? ` ${words.path}: ${paths.join(", ")}.` : "";
    setText(note, `${words.turns} ${payload.is_cpu ? words.cpu : ""}${path}`);
  };
};
