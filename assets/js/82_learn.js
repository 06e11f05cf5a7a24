// Dictionaries that a lane lacks: what is missing, learning it here, and how far that has come.
"use strict";

KVLens.onLearning = KVLens.signal({ state: "idle" });

KVLens.learning = (component) => {
  KVLens.learning.ask = (request) => component.trigger("learn", request);
  KVLens.learning.stop = () => component.trigger("stop");
  KVLens.follow(component, (text) => {
    if (!text) return;
    const word = JSON.parse(text);
    KVLens.onLearning.tell(word);
    if (word.state !== "done") return;
    // What was said about the missing dictionary is over; a prompt that waited for it goes on.
    if (KVLens.feed.latest) KVLens.feed.latest.notices = [];
    KVLens.feed.redraw();
    if (word.is_awaited && document.querySelector("#kv-prompt textarea").value.trim()) document.querySelector("#kv-send").click();
  });
};

// The box in a lane; `valueOf` gives the lane's present settings.
KVLens.learnBox = (laneId, valueOf) => {
  const { make, setText, units } = KVLens;
  const words = KVLens.text.learn;
  const sentence = make("p", { class: "kv-learn-sentence" });
  const about = make("p", { class: "kv-learn-about", text: words.about });
  const own = make("textarea", { rows: 4, "aria-label": words.own_text });
  const hint = make("small");
  const text = make("details", {}, make("summary", { text: words.own_text }), own, hint);
  const go = make("button", { type: "button", class: "kv-strong", on: { click: ask } });
  const stop = make("button", { type: "button", class: "kv-learn-stop", text: words.stop, on: { click: halt } });
  const bar = make("i");
  const meter = make("div", { class: "kv-bar", role: "progressbar", "aria-label": words.progress, "aria-valuemin": 0, "aria-valuemax": 100 }, bar);
  const told = make("span", { role: "status" });
  const fault = make("p", { class: "kv-learn-fault", role: "alert" });
  const root = make("div", { class: "kv-learn" }, sentence, about, text, make("div", { class: "kv-learn-run" }, go, stop, meter, told), fault);
  let [lacks, word] = [null, { state: "idle" }];

  function ask() { KVLens.learning.ask({ lane: JSON.stringify(valueOf()), text: own.value }); }

  function halt() {
    KVLens.learning.stop();
    word = { ...word, isStopping: true };
    draw();
  }

  function progress() {
    if (word.isStopping) return words.stopping;
    if (word.state === "waiting") return words.waiting;
    if (word.stage === undefined || word.stage === "reading") return words.reading;
    const error = word.error === null ? null : units.percent(word.error);
    return KVLens.fill(error ? words.learning : words.starting, { layer: word.layer, side: word.side, error });
  }

  function draw() {
    root.hidden = !lacks;
    if (!lacks) return;
    const isOwn = word.kind === lacks.kind;
    const isAnyBusy = word.state === "waiting" || word.state === "learning";
    const isBusy = isAnyBusy && isOwn;
    setText(sentence, lacks.sentence);
    about.hidden = isBusy || !lacks.can_learn;
    text.hidden = about.hidden;
    own.maxLength = lacks.max_characters;
    setText(hint, lacks.is_text_added ? KVLens.fill(words.added_text_hint, { n: units.count(lacks.max_characters) }) : words.own_text_hint);
    go.parentElement.hidden = !lacks.can_learn;
    go.hidden = isBusy;
    go.disabled = isAnyBusy;
    setText(go, isOwn && word.state === "failed" ? words.again : words.go);
    stop.hidden = meter.hidden = !isBusy;
    const share = isBusy ? word.share || 0 : 0;
    bar.style.transform = `scaleX(${share})`;
    meter.setAttribute("aria-valuenow", String(Math.round(100 * share)));
    setText(told, isBusy ? `${share ? `${Math.floor(100 * share)} % · ` : ""}${progress()}` : isAnyBusy ? words.busy
      : isOwn && (word.state === "stopped" || word.state === "done") ? words[word.state] : "");
    setText(fault, isBusy || (word.kind && !isOwn) ? "" : word.sentence || "");
  }
  KVLens.onRemarks((remarks) => { lacks = remarks[laneId]?.lacks || null; draw(); });
  KVLens.onLearning((next) => { word = { ...next, isStopping: word.isStopping && next.state === "learning" }; draw(); });
  return root;
};
