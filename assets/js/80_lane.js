// A lane's head: which method, its settings, and its large live figures.
"use strict";

KVLens.lane = (component, laneId) => {
  const { make, setText, units, colours } = KVLens;
  const words = KVLens.text.lane;
  const root = component.element.querySelector(".kv-lane");
  let value = null;

  // --- choosing a method and its settings ---------------------------------------------------------
  const method = make("select", { class: "kv-method", "aria-label": words.method, on: { change: () => pickMethod(method.value) } },
    ...KVLens.methods.map((entry) => make("option", { value: entry.name, text: entry.title })));
  const summary = make("button", {
    type: "button", class: "kv-summary", title: words.settings, "aria-expanded": "false", on: { click: () => open(popover.hidden) },
  });
  const popover = make("div", { class: "kv-popover", role: "dialog", "aria-label": words.settings });
  popover.hidden = true;
  root.append(make("div", { class: "kv-lane-head" }, make("i", { class: "kv-dot" }), method, summary, popover));

  const entryOf = (name) => KVLens.methods.find((entry) => entry.name === name) || KVLens.methods[0];

  function commit(next) {
    value = next;
    component.props.value = JSON.stringify(value);
    component.trigger("change");
    drawControls();
  }
  function pickMethod(name) {
    const entry = entryOf(name);
    commit({ method: entry.name, config: { ...entry.default } });
  }
  function set(name, entry) { commit({ ...value, config: { ...value.config, [name]: entry } }); }
  function open(isOpen) {
    popover.hidden = !isOpen;
    summary.setAttribute("aria-expanded", String(isOpen));
  }
  document.addEventListener("pointerdown", (event) => {
    if (!popover.hidden && !root.querySelector(".kv-lane-head").contains(event.target)) open(false);
  });
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !popover.hidden) { open(false); event.stopPropagation(); }
  });

  // What a person sets a field with: its `root`, and `set` to show another value in it.
  function control(field) {
    const show = (entry) => (entry === null ? words.none : `${entry}`);
    const segments = (choices) => KVLens.segments(choices, field.label, (entry) => set(field.name, entry));
    if (field.kind === "switch") return segments([[true, words.on], [false, words.off]]);
    if (field.kind === "choices" && field.choices.length <= 5) return segments(field.choices.map((entry) => [entry, show(entry)]));
    if (field.kind === "choices") {
      const box = make("select", { "aria-label": field.label, on: { change: () => set(field.name, field.choices[box.selectedIndex]) } },
        ...field.choices.map((entry) => make("option", { text: show(entry) })));
      return { root: box, set(current) { box.selectedIndex = field.choices.indexOf(current); } };
    }
    const box = make("input", {
      type: "number", min: field.minimum, max: field.maximum, step: field.step, "aria-label": field.label,
      on: { change: () => set(field.name, Math.min(field.maximum, Math.max(field.minimum, Number(box.value)))) },
    });
    return { root: box, set(current) { if (box.value !== String(current)) box.value = current; } };
  }
  function presetControl(presets) {
    const custom = make("option", { value: "", text: words.custom });
    const box = make("select", { "aria-label": words.preset, on: { change: () => {
      if (box.value !== "") commit({ ...value, config: { ...presets[Number(box.value)][1] } });
    } } }, custom, ...presets.map(([name], index) => make("option", { value: index, text: name })));
    return { root: box, set(config) {
      const same = presets.findIndex(([, entry]) => JSON.stringify(entry) === JSON.stringify(config));
      custom.hidden = same >= 0;
      box.value = same < 0 ? "" : String(same);
    } };
  }

  // The controls of one method stay the same ones while their values change: a number that is typed in is taken over as the
  // next button is pressed, and that button must still be there when it is let go; the keyboard keeps its place too.
  let [built, updates] = ["", []];
  function buildControls(entry) {
    const presets = Object.entries(entry.presets);
    const rows = [
      make("p", { class: "kv-method-summary", text: entry.summary }),
      make("p", { class: "kv-lane-estimate" }), make("p", { class: "kv-lane-problem", role: "alert" }),
    ];
    [built, updates] = [entry.name, []];
    if (presets.length > 1) {
      const preset = presetControl(presets);
      updates.push(() => preset.set(value.config));
      rows.push(make("div", { class: "kv-field" }, make("label", { text: words.preset }), preset.root));
    }
    if (!entry.fields.length) rows.push(make("p", { text: words.nothing_to_set }));
    for (const field of entry.fields) {
      const label = field.unit ? `${field.label} (${field.unit})` : field.label;
      const own = control(field);
      updates.push(() => own.set(value.config[field.name]));
      rows.push(make("div", { class: "kv-field" }, make("label", { text: label }), own.root, make("small", { text: field.help })));
    }
    popover.replaceChildren(...rows);
  }
  function drawControls() {
    const entry = entryOf(value.method);
    method.value = entry.name;
    root.style.setProperty("--lane-colour", `var(--kv-method-${entry.name})`);
    if (built !== entry.name) buildControls(entry);
    for (const update of updates) update();
    drawRemarks();
  }

  // What Python says about these settings: in a few words, what is wrong, what they would save.
  let remarks = {};
  function drawRemarks() {
    const own = remarks[laneId] || {};
    setText(summary, own.description || (entryOf(value.method).fields.length ? words.settings : "16 bit"));
    const problem = popover.querySelector(".kv-lane-problem");
    if (problem) setText(problem, own.problem || "");
    const estimate = popover.querySelector(".kv-lane-estimate");
    if (estimate) setText(estimate, own.estimate || "");
    root.classList.toggle("kv-has-problem", Boolean(own.problem));
  }
  KVLens.onRemarks((next) => { remarks = next; if (value) drawRemarks(); });

  // --- the large figures --------------------------------------------------------------------------
  const figure = (name) => {
    const number = make("b", { text: "–" });
    const unit = make("span");
    const detail = make("small", { text: " " });
    return { number, unit, detail, root: make("div", { class: `kv-figure kv-figure-${name}`, title: words[`${name}_help`] }, make("div", {}, number, unit), detail) };
  };
  const [speed, bytes, bits] = ["speed", "bytes", "bits"].map(figure);
  const status = make("div", { class: "kv-lane-status" });
  const jump = make("button", { type: "button", class: "kv-parting", title: words.jump, on: { click: () => KVLens.showParting(laneId) } });
  const story = make("span");
  status.append(jump, story);
  root.append(make("div", { class: "kv-figures" }, speed.root, bytes.root, bits.root), status, KVLens.learnBox(laneId, () => value));

  function drawFigures(payload) {
    const lane = payload.lanes.find((one) => one.id === laneId);
    if (!lane) return;
    const figures = lane.figures;
    setText(speed.number, units.figures(figures.tokens_per_second));
    setText(speed.unit, words.tokens_per_second);
    setText(speed.detail, figures.is_reference ? words.same
      : figures.speed_ratio ? `${units.figures(figures.speed_ratio)}${words.speed_ratio}` : " ");
    const [size, unit] = units.bytes(figures.live_bytes).split(" ");
    setText(bytes.number, size);
    setText(bytes.unit, `${unit || ""} ${words.kv}`);
    const ratio = figures.times_smaller;
    setText(bytes.detail, ratio === null ? " "
      : Math.abs(ratio - 1) < 0.005 ? words.of_fp16 : units.saving(ratio));
    setText(bits.number, units.figures(figures.bits_per_value));
    setText(bits.unit, words.bits);
    setText(bits.detail, words.everything);
  }

  function drawStatus(payload) {
    const lane = payload.lanes.find((one) => one.id === laneId);
    if (!lane) return;
    const other = payload.lanes.find((one) => one.id !== laneId);
    const hasParted = payload.difference !== null && payload.difference !== undefined;
    const isOver = payload.lanes.every((one) => one.finish);
    jump.classList.toggle("kv-has-parted", hasParted);
    setText(jump, !other || !lane.figures.new_tokens ? "" : hasParted
      ? KVLens.fill(words.parts_at, { other: other.name, n: payload.difference + 1 }) : isOver ? words.identical : words.together);
    jump.disabled = !hasParted;
    const figures = lane.figures;
    const parts = [];
    if (figures.prefill_ms) {
      const fresh = units.count(figures.prompt_tokens - figures.reused_tokens);
      parts.push(KVLens.fill(figures.reused_tokens ? words.reused : words.prefilled,
        { new: fresh, reused: units.count(figures.reused_tokens), ms: units.duration(figures.prefill_ms) }));
    }
    if (lane.finish) {
      const finish = KVLens.text.finish[lane.finish] || lane.finish;
      parts.push(KVLens.fill(words.told, { n: units.count(figures.new_tokens), finish }));
    }
    if (lane.is_simulated) parts.push(words.simulated);
    setText(story, parts.join(" · "));
    story.title = story.textContent;
  }

  KVLens.tokenHover(laneId);
  KVLens.answers.watch(laneId);
  KVLens.follow(component, (text) => {
    if (!text) return;
    value = JSON.parse(text);
    drawControls();
  });
  KVLens.feed.listen((payload) => {
    if (!payload.lanes) return;
    drawFigures(payload);
    drawStatus(payload);
  });
};

// Remarks come with the address: one message serves both lanes.
KVLens.onRemarks = KVLens.signal({});
