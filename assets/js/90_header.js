// The header: which model runs where, how full its context is, recorded runs, link, export, help.
"use strict";

KVLens.header = (component) => {
  const { make, setText, units } = KVLens;
  const words = KVLens.text.header;
  const root = component.element.querySelector(".kv-header");
  let state = {};

  // --- small menus --------------------------------------------------------------------------------
  function menu(label, extra = {}) {
    const list = make("div", { class: "kv-menu-list" });
    list.hidden = true;
    const button = make("button", {
      type: "button", class: "kv-quiet", text: label, "aria-expanded": "false", on: { click: () => open(list.hidden) }, ...extra,
    });
    const box = make("div", { class: "kv-menu" }, button, list);
    function open(isOpen) { list.hidden = !isOpen; button.setAttribute("aria-expanded", String(isOpen)); }
    document.addEventListener("pointerdown", (event) => { if (!box.contains(event.target)) open(false); });
    box.addEventListener("keydown", (event) => { if (event.key === "Escape") { open(false); event.stopPropagation(); } });
    return { box, button, list, open };
  }
  function item(list, label, call) {
    return make("button", { type: "button", text: label, on: { click: () => { list.open(false); call(); } } });
  }

  // --- model chip ---------------------------------------------------------------------------------
  const model = menu("", { class: "kv-chip" });
  const dot = make("i", { class: "kv-live-dot" });
  const name = make("b");
  const facts = make("span");
  model.button.append(dot, name, facts);
  const field = make("input", {
    type: "text", class: "kv-model-name", placeholder: words.model_hint, "aria-label": words.change_model, spellcheck: "false",
    on: { keydown: (event) => { if (event.key === "Enter") load(); } },
  });
  const button = make("button", { type: "button", class: "kv-strong", text: words.load, on: { click: () => load() } });
  const offered = make("div", { class: "kv-offered" });
  const demonstration = make("p", { text: words.demonstration });
  const row = make("div", { class: "kv-row" }, field, button);
  const served = make("p");
  const progress = make("p", { role: "status" });
  // A model that is fixed still has facts to read, and a load that may fail.
  model.list.append(served, make("div", { class: "kv-model-choice" }, make("h4", { text: words.change_model }), row, demonstration, offered), progress);
  function load(chosen) { component.trigger("model", { name: chosen ?? field.value }); }

  // A labelled bar: how much of something is used.
  function gauge(label, extra = {}) {
    const fill = make("i");
    const figures = make("span");
    const box = make("div", { class: "kv-gauge", ...extra }, make("span", { text: label }), make("div", { class: "kv-bar" }, fill), figures);
    return {
      box,
      set(share, text) {
        fill.style.transform = `scaleX(${Math.min(1, share)})`;
        box.classList.toggle("kv-is-filling", share > 0.85);
        setText(figures, text);
      },
    };
  }
  const context = gauge(words.context_label);
  const budget = gauge(words.budget_label, { title: words.budget_help });
  budget.box.hidden = true;

  // --- menus on the right -------------------------------------------------------------------------
  const recorded = menu(words.recorded);
  const link = make("button", { type: "button", class: "kv-quiet", text: words.link, on: { click: copyLink } });
  const output = menu(words.export);
  const file = make("input", { type: "file", accept: ".gz,.json", class: "kv-hidden", on: { change: importFile } });
  output.list.append(
    item(output, words.export_json, () => component.trigger("export", { kind: "json" })),
    item(output, words.export_csv, () => component.trigger("export", { kind: "csv" })),
    item(output, words.import, () => file.click()),
    file,
  );
  const theme = make("button", { type: "button", class: "kv-quiet kv-icon", text: "◐", title: words.theme, "aria-label": words.theme, on: { click: () => KVLens.theme.toggle() } });
  const help = menu("?", { class: "kv-quiet kv-icon", title: words.help, "aria-label": words.help, id: "kv-help" });
  help.list.classList.add("kv-help");
  help.list.append(...KVLens.text.help.flatMap(([title, body]) => [make("h4", { text: title }), make("p", { text: body })]));

  root.append(
    make("div", { class: "kv-header-row" },
      make("div", { class: "kv-word", "aria-label": KVLens.text.title, title: KVLens.text.tagline }, "KV", make("em", { text: "Lens" })),
      model.box, context.box, budget.box, make("div", { class: "kv-header-tools" }, recorded.box, link, output.box, theme, help.box)),
  );

  function copyLink() {
    const done = () => { setText(link, words.copied); setTimeout(() => setText(link, words.link), 1500); };
    if (navigator.clipboard) navigator.clipboard.writeText(location.href).then(done, () => prompt(words.link, location.href));
    else prompt(words.link, location.href);
  }
  async function importFile() {
    const chosen = file.files[0];
    if (!chosen) return;
    const bytes = new Uint8Array(await chosen.arrayBuffer());
    let raw = "";
    for (let at = 0; at < bytes.length; at += 32768) raw += String.fromCharCode(...bytes.subarray(at, at + 32768));
    component.trigger("upload", { name: chosen.name, data: btoa(raw) });
    file.value = "";
  }

  function draw(text) {
    if (!text) return;
    const before = state.name;
    state = JSON.parse(text);
    if (state.name !== before) KVLens.onModel.tell(state.name);
    setText(name, state.name || words.no_model);
    const parts = [state.weight_bytes ? `${units.bytes(state.weight_bytes)} ${words.parameters}` : "",
      state.max_context ? KVLens.fill(words.context, { n: units.count(state.max_context) }) : "", state.device || ""];
    setText(facts, state.is_loading ? words.loading : parts.filter(Boolean).join(" · "));
    setText(served, [state.name || words.no_model, ...parts].filter(Boolean).join(" · "));
    dot.classList.toggle("kv-is-loading", Boolean(state.is_loading));
    dot.classList.toggle("kv-is-bad", Boolean(state.problem) && !state.name);
    setText(progress, state.problem || state.progress || "");
    progress.classList.toggle("kv-bad", Boolean(state.problem));
    KVLens.machineNote(state.is_cpu ? words.cpu : "");
    model.list.classList.toggle("kv-fixed", !state.can_change);
    row.hidden = !state.can_type;
    demonstration.hidden = !state.is_embedded;
    offered.replaceChildren(...(state.offered || []).map((entry) => make("button", { type: "button", text: entry, on: { click: () => load(entry) } })));
    recorded.list.replaceChildren(...(state.recorded || []).map((entry) => item(recorded, entry.label, () => component.trigger("recorded", { id: entry.id }))));
    if (!(state.recorded || []).length) recorded.list.append(make("p", { text: words.none_recorded }));
    drawContext(KVLens.feed.latest);
  }
  function drawContext(payload) {
    // A run of another model (one before the last load, a recorded one) says nothing about this one's context.
    const own = payload?.model === state.name ? payload?.context : null;
    const limit = state.max_context || own?.limit;
    const used = own?.used || 0;
    context.set(limit ? used / limit : 0,
      limit ? KVLens.fill(words.context_used, { used: units.count(used), limit: units.count(limit) }) : "");
    const caches = payload?.budget ?? drawContext.lastBudget;
    drawContext.lastBudget = caches;
    budget.box.hidden = !caches;
    if (caches) {
      budget.set(caches.used / caches.limit,
        KVLens.fill(words.budget_used, { used: units.bytes(caches.used), limit: units.bytes(caches.limit) }));
    }
  }
  KVLens.follow(component, draw);
  KVLens.feed.listen(drawContext);
};
