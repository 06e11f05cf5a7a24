// What all plots share: plotly once it has arrived, a quiet layout, and drawing without rebuilding.
"use strict";

KVLens.plots = (() => {
  const config = { displayModeBar: false, responsive: false, doubleClick: "reset", scrollZoom: false };

  const whenReady = new Promise((resolve) => {
    const check = () => (window.Plotly ? resolve(window.Plotly) : setTimeout(check, 15));
    check();
  });

  function layout(extra = {}) {
    const css = (name) => KVLens.colours.css(name);
    return {
      uirevision: "kept",
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 52, r: 10, t: 22, b: 36 },
      font: { family: '"KVLens Sans", system-ui, sans-serif', size: 11.5, color: css("muted") },
      showlegend: false,
      hovermode: "x unified",
      hoverlabel: {
        bgcolor: css("card"), bordercolor: css("line-strong"), font: { color: css("ink"), size: 12 },
      },
      ...extra,
    };
  }

  function axis(title, extra = {}) {
    const line = KVLens.colours.css("line");
    return {
      title: { text: title, standoff: 6, font: { size: 11 } },
      gridcolor: line, zeroline: false, linecolor: line, tickcolor: line, ticks: "", fixedrange: false,
      automargin: false, ...extra,
    };
  }

  // A box that changes its size without the window (another row of buttons above it) takes its plot along.
  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.isConnected && target.offsetHeight > 0 && target.data) Plotly.Plots.resize(target);
  });

  function draw(node, traces, plotLayout) {
    if (window.Plotly) {
      const drawn = Plotly.react(node, traces, plotLayout, config);
      sizes.observe(node);
      return drawn;
    }
    return whenReady.then(() => KVLens.feed.redraw());
  }

  return { layout, axis, draw, whenReady };
})();

// A steady upper end of a token axis: it moves in steps, so that curves grow without the axis creeping.
KVLens.steadyEnd = (start, now) => {
  const step = now - start < 64 ? 16 : 64;
  return start + Math.max(step, Math.ceil((now - start) / step) * step);
};
