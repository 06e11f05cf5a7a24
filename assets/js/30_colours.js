// Colours of the current theme, and the theme itself.
"use strict";

KVLens.colours = {
  isDark() { return document.body.classList.contains("dark"); },
  css(name) { return getComputedStyle(document.body).getPropertyValue(`--kv-${name}`).trim(); },
  method(name) {
    const shade = KVLens.palette.methods[name] || KVLens.palette.exact;
    return this.isDark() ? shade.dark : shade.light;
  },
  mix(colour, strength) {
    const card = this.css("card");
    const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    const [front, back] = [parse(colour), parse(card)];
    return `rgb(${front.map((value, index) => Math.round(value * strength + back[index] * (1 - strength))).join(",")})`;
  },
  // Grey is exact, in every lane; packed parts carry their method's colour.
  part(method, part) {
    const strength = KVLens.palette.strength[part];
    if (method === "dense" || strength === null || strength === undefined) {
      const exact = this.isDark() ? KVLens.palette.exact.dark : KVLens.palette.exact.light;
      return this.mix(exact, part === "sinks" ? 0.9 : 0.5);
    }
    return this.mix(this.method(method), strength);
  },
  heat() {
    const stops = KVLens.palette.heat[this.isDark() ? "dark" : "light"];
    return stops.map((colour, index) => [index / (stops.length - 1), colour]);
  },
};

KVLens.theme = {
  toggle() {
    document.body.classList.toggle("dark");
    try { localStorage.setItem("kvlens-theme", KVLens.colours.isDark() ? "dark" : "light"); } catch { /* private window */ }
  },
  restore() {
    let kept = null;
    try { kept = localStorage.getItem("kvlens-theme"); } catch { /* private window */ }
    if (kept && !new URLSearchParams(location.search).has("__theme")) {
      document.body.classList.toggle("dark", kept === "dark");
    }
  },
  // Gradio or a person may change the theme at any time: draw again then. The body's other classes change no colour.
  follow() {
    this.restore();
    let wasDark = KVLens.colours.isDark();
    new MutationObserver(() => {
      if (wasDark === KVLens.colours.isDark()) return;
      wasDark = !wasDark;
      KVLens.feed.redraw();
    }).observe(document.body, { attributeFilter: ["class"] });
  },
};

// Gradio adds the page's head from its own script: the document may be read to its end by now.
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", () => KVLens.theme.follow());
else KVLens.theme.follow();
