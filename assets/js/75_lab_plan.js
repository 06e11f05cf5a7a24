// The throughput lab's controls: which model, methods, contexts, batches and budget; how far it has come.
"use strict";

KVLens.labControls = ({ onMeasure, onStop }) => {
  const { make, setText, units } = KVLens;
  const words = KVLens.text.lab;
  const root = make("section", { class: "kv-panel kv-lab-plan" });
  root.hidden = true;
  let [offer, state, ownBudget] = [null, "idle", null];
  const chosen = { subject: null, choices: new Set(), contexts: new Set(), batch_sizes: new Set() };
  const isBusy = () => state === "waiting" || state === "running";

  // --- fields -------------------------------------------------------------------------------------
  const subject = make("select", { "aria-label": words.subject, on: { change: () => { chosen.subject = subject.value; ownBudget = null; draw(); } } });
  const hint = make("small");
  const methods = make("div", { class: "kv-lab-methods" });
  const contexts = make("div", { class: "kv-lab-pills" });
  const batches = make("div", { class: "kv-lab-pills" });
  const budget = make("input", {
    type: "number", min: 1, step: "any", "aria-label": `${words.budget} (MB)`,
    on: { change: () => { ownBudget = Number(budget.value) > 0 ? Math.round(Number(budget.value) * 1e6) : null; drawBudget(); } },
  });
  const budgetNote = make("small");
  const automatic = make("button", { type: "button", class: "kv-quiet", text: words.budget_reset, on: { click: () => { ownBudget = null; drawBudget(); } } });
  const field = (label, ...content) => make("div", { class: "kv-lab-field" }, make("h4", { text: label }), ...content);

  const go = make("button", { type: "button", class: "kv-strong kv-lab-go", on: { click: () => onMeasure(plan()) } });
  const stop = make("button", { type: "button", class: "kv-lab-stop", text: words.stop, on: { click: onStop } });
  const bar = make("i");
  const told = make("span", { class: "kv-lab-told", role: "status" });
  const notice = make("div", { class: "kv-notice", role: "alert" });
  root.append(
    make("header", {}, make("h3", { text: words.title }), make("span", { text: words.subtitle })),
    make("p", { class: "kv-lab-intro", text: words.intro }),
    make("div", { class: "kv-lab-fields" },
      field(words.subject, subject, hint), field(words.methods, methods), field(words.contexts, contexts),
      field(words.batch_sizes, batches),
      field(words.budget, make("div", { class: "kv-lab-budget" }, budget, make("span", { text: "MB" }), automatic), budgetNote)),
    make("div", { class: "kv-lab-run" }, go, stop, make("div", { class: "kv-bar" }, bar), told),
    notice,
  );

  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && isBusy() && root.offsetParent) onStop(); });

  // --- what is chosen -----------------------------------------------------------------------------
  const key = (choice) => JSON.stringify([choice.method, choice.preset]);
  const entry = () => offer.subjects.find((one) => one.id === chosen.subject);
  const sorted = (numbers) => [...numbers].sort((left, right) => left - right);
  const usable = () => sorted(chosen.contexts).filter((tokens) => tokens <= entry().max_context);
  const numCells = () => chosen.choices.size * usable().length * chosen.batch_sizes.size;

  // Half of the largest cell shows where fp16 runs out; with one size alone it would show nothing else.
  const hasSizes = () => usable().length * chosen.batch_sizes.size > 1;
  function limitBytes() {
    if (ownBudget !== null) return ownBudget;
    const largest = Math.max(0, ...usable()) * Math.max(0, ...chosen.batch_sizes) * entry().fp16_token_bytes;
    const most = entry().is_shape ? Infinity : offer.bounds.max_bytes;
    return Math.max(1e6, Math.min(most, Math.ceil(largest / (hasSizes() ? 2e6 : 1e6)) * 1e6));
  }
  function plan() {
    return {
      subject: chosen.subject, limit_bytes: limitBytes(), contexts: usable(), batch_sizes: sorted(chosen.batch_sizes),
      choices: [...chosen.choices].map((one) => JSON.parse(one)).map(([method, preset]) => ({ method, preset })),
    };
  }
  function start(next) {
    const isFirst = offer === null;
    offer = next;
    root.hidden = false;
    if (isFirst) {
      for (const choice of offer.defaults.choices) chosen.choices.add(key(choice));
      for (const tokens of offer.defaults.contexts) chosen.contexts.add(tokens);
      for (const size of offer.defaults.batch_sizes) chosen.batch_sizes.add(size);
    }
    if (!offer.subjects.some((one) => one.id === chosen.subject)) chosen.subject = offer.subjects[0].id;
  }

  // --- drawing ------------------------------------------------------------------------------------
  function pill(label, set, value, isOff = false) {
    const button = make("button", {
      type: "button", class: "kv-pill", text: label, "aria-pressed": String(set.has(value) && !isOff), disabled: isOff || isBusy() ? "" : null,
      on: { click: toggle },
    });
    // The button stays the same one: it keeps the focus, and a second click its target.
    function toggle() {
      if (!set.delete(value)) set.add(value);
      button.setAttribute("aria-pressed", String(set.has(value)));
      drawBudget();
      drawRun(last);
    }
    return button;
  }
  function drawFields() {
    subject.replaceChildren(...offer.subjects.map((one) => make("option", {
      value: one.id, text: KVLens.fill(one.is_shape ? words.shape : words.served, one), selected: one.id === chosen.subject ? "" : null,
    })));
    setText(hint, entry().is_shape ? KVLens.fill(words.shape_hint, { name: entry().name, layers: entry().num_layers }) : "");
    methods.replaceChildren(...KVLens.methods.map((method) => make("div", { style: { "--lane-colour": `var(--kv-method-${method.name})` } },
      make("i", { class: "kv-dot" }), ...Object.keys(method.presets).map((preset) => pill(preset, chosen.choices, key({ method: method.name, preset }))))));
    contexts.replaceChildren(...offer.contexts.map((tokens) => pill(units.context(tokens), chosen.contexts, tokens, tokens > entry().max_context)));
    batches.replaceChildren(...offer.batch_sizes.map((size) => pill(`${size}`, chosen.batch_sizes, size)));
    drawBudget();
    for (const box of [subject, budget]) box.disabled = isBusy();
  }
  function drawBudget() {
    if (document.activeElement !== budget) budget.value = limitBytes() / 1e6;
    setText(budgetNote, ownBudget !== null ? words.budget_own : hasSizes() ? words.budget_auto : words.budget_whole);
    automatic.hidden = ownBudget === null;
  }
  function drawRun(payload) {
    const [cells, limit, progress] = [numCells(), offer.bounds.max_cells, payload.progress];
    setText(go, words.measure);
    go.hidden = isBusy();
    go.disabled = cells === 0 || cells > limit;
    stop.hidden = !isBusy();
    const hasBegun = progress && state !== "idle";
    bar.style.transform = `scaleX(${isBusy() && progress ? progress.done / progress.total : 0})`;
    bar.parentElement.hidden = !isBusy();
    setText(told, state === "waiting" ? words.waiting : state === "running" ? running(progress)
      : hasBegun && state === "stopped" ? KVLens.fill(words.stopped, { n: progress.done, total: progress.total })
        : KVLens.fill(cells > limit ? words.too_many : words.cells, { n: cells, limit }));
    setText(notice, payload.notice || "");
  }
  function running(progress) {
    if (!progress.cell) return words.starting;
    const [label, tokens, batch] = progress.cell;
    const cell = KVLens.fill(words.progress, { n: progress.done + 1, total: progress.total, label, batch, context: units.context(tokens) });
    const left = progress.seconds_left;
    return left === null ? cell : `${cell} · ${KVLens.fill(words.left, { time: left < 1.5 ? "1 s" : left < 90 ? `${Math.round(left)} s` : `${Math.round(left / 60)} min` })}`;
  }

  let [last, wasBusy] = [{}, false];
  function draw() {
    if (offer === null) return;
    drawFields();
    drawRun(last);
  }
  return {
    root,
    receive(payload) {
      last = payload;
      state = payload.state;
      if (payload.offer) start(payload.offer);
      if (offer === null) return;
      if (payload.offer || wasBusy !== isBusy()) drawFields();
      wasBusy = isBusy();
      drawRun(payload);
    },
    get steps() { return offer?.steps; },
  };
};
