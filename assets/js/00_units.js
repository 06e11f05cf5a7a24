// Numbers as a person reads them (the same rules as ui/units.py), text templates, and small DOM helpers.
"use strict";
window.KVLens = window.KVLens || {};

KVLens.units = {
  bytes(count) {
    if (count === null || count === undefined) return "–";
    const names = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (count >= 999.5 && unit < names.length - 1) { count /= 1000; unit += 1; }
    const decimals = unit === 0 || count >= 99.95 ? 0 : count >= 9.995 ? 1 : 2;
    return `${count.toFixed(decimals)} ${names[unit]}`;
  },
  figures(value, digits = 3) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    if (value === 0) return "0";
    const size = Math.floor(Math.log10(Math.abs(value))) + 1;
    return value.toFixed(Math.max(0, Math.min(4, digits - size)));
  },
  duration(ms) {
    if (ms === null || ms === undefined) return "–";
    return ms < 1000 ? `${KVLens.units.figures(ms)} ms` : `${KVLens.units.figures(ms / 1000)} s`;
  },
  percent(share) {
    return share === null || share === undefined ? "–" : `${KVLens.units.figures(100 * share)} %`;
  },
  count(number) {
    return number === null || number === undefined ? "–" : number.toLocaleString("en-US");
  },
  // How a cache stands to fp16: `ratio` is fp16's bytes over its own.
  saving(ratio) {
    const { figures } = KVLens.units, { smaller, larger } = KVLens.text.lane;
    return ratio < 1 ? `${figures(1 / ratio)}${larger}` : `${figures(ratio)}${smaller}`;
  },
  context(tokens) {
    return tokens % 1024 === 0 ? `${tokens / 1024}k` : KVLens.units.count(tokens);
  },
};

// Fill `{name}` in a sentence from ui/text.py.
KVLens.fill = (template, values) => template.replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);

// A fault in one part of the page is told in the console and stays in that part.
KVLens.guarded = (call) => (...values) => {
  try { return call(...values); } catch (fault) { console.error(fault); return undefined; }
};

// For the few places (plotly labels) that read a little HTML.
KVLens.escape = (text) => String(text).replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);

// Build an element. Text only ever enters as text, never as HTML.
KVLens.make = (tag, options = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
    else if (name === "style") for (const [key, entry] of Object.entries(value)) node.style.setProperty(key, entry);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};

// Change text only when it differs: nothing flickers and selections survive.
KVLens.setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };

// A row of buttons of which one is pressed. `choices` are [value, label] pairs.
KVLens.segments = (choices, label, onPick) => {
  const root = KVLens.make("div", { class: "kv-segments", role: "group", "aria-label": label });
  const buttons = choices.map(([value, name]) => {
    const button = KVLens.make("button", { type: "button", text: name, on: { click: () => onPick(value) } });
    root.append(button);
    return [value, button];
  });
  return {
    root,
    set(value) { for (const [own, button] of buttons) button.setAttribute("aria-pressed", String(own === value)); },
  };
};
