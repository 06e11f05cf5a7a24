// The answers: where they part, what a token's probability was, and the line that says what goes on.
"use strict";

KVLens.answers = (() => {
  const canMark = typeof Highlight !== "undefined" && CSS.highlights;

  // The text node of the newest answer of a lane, if it is the one the payload speaks of. Texts come more often than
  // payloads: while it grows, the one on the page is the longer one.
  function answerNode(laneId) {
    const lane = KVLens.feed.latest?.lanes?.find((one) => one.id === laneId);
    const bubbles = document.querySelectorAll(`#kv-chat-${laneId} [data-testid="bot"] .message-content .md`);
    const node = bubbles[bubbles.length - 1]?.firstChild;
    if (!lane || !node || node.nodeType !== Node.TEXT_NODE) return null;
    const grows = ["running", "replay"].includes(KVLens.feed.latest.state);
    const length = node.textContent.length;
    return length === lane.characters || (grows && length > lane.characters) ? node : null;
  }
  function range(node, start, end) {
    const own = document.createRange();
    const length = node.textContent.length;
    own.setStart(node, Math.min(start, length));
    own.setEnd(node, Math.min(end, length));
    return own;
  }
  function mark() {
    const payload = KVLens.feed.latest;
    if (!canMark || !payload || !payload.lanes) return;
    const [tokens, rests] = [[], []];
    for (const lane of payload.lanes) {
      const node = lane.parting && answerNode(lane.id);
      if (!node) continue;
      tokens.push(range(node, lane.parting[0], lane.parting[1]));
      rests.push(range(node, lane.parting[1], node.textContent.length));
    }
    CSS.highlights.set("kv-parting-token", new Highlight(...tokens));
    CSS.highlights.set("kv-parted", new Highlight(...rests));
  }

  let isQueued = false;
  function queue() {
    if (isQueued) return;
    isQueued = true;
    requestAnimationFrame(() => { isQueued = false; mark(); });
  }
  function watch(laneId) {
    const wait = () => {
      const chat = document.querySelector(`#kv-chat-${laneId}`);
      if (!chat) return requestAnimationFrame(wait);
      new MutationObserver(queue).observe(chat, { childList: true, characterData: true, subtree: true });
      return queue();
    };
    wait();
  }
  KVLens.feed.listen(queue);
  return { answerNode, range, watch };
})();

// Shows the questions that go on from one example ("" hides all of them), and the end of its prompt once it is filled in:
// there stands what is asked.
KVLens.thenAsk = (id) => {
  for (const row of document.querySelectorAll(".kv-then")) row.classList.toggle("kv-is-open", row.id === id);
  const field = document.querySelector("#kv-prompt textarea");
  requestAnimationFrame(() => requestAnimationFrame(() => { field.scrollTop = field.scrollHeight; }));
};

KVLens.showParting = (laneId) => {
  const lane = KVLens.feed.latest?.lanes?.find((one) => one.id === laneId);
  const node = lane?.parting && KVLens.answers.answerNode(laneId);
  if (!node) return;
  const box = KVLens.answers.range(node, lane.parting[0], Math.max(lane.parting[0] + 1, lane.parting[1])).getBoundingClientRect();
  const log = document.querySelector(`#kv-chat-${laneId} .bubble-wrap, #kv-chat-${laneId} [role="log"]`);
  const frame = log.getBoundingClientRect();
  const smooth = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  log.scrollBy({ top: box.top - frame.top - frame.height / 2, behavior: smooth });
};

// Hovering a finished answer shows the token under the pointer: its probability and what nearly stood there.
KVLens.tokenHover = (laneId) => {
  const { make, units } = KVLens;
  const tip = make("div", { class: "kv-tip", role: "tooltip" });
  tip.hidden = true;
  document.body.append(tip);

  function offsetAt(event, node) {
    if (document.caretPositionFromPoint) {
      const place = document.caretPositionFromPoint(event.clientX, event.clientY);
      return place && place.offsetNode === node ? place.offset : null;
    }
    const place = document.caretRangeFromPoint?.(event.clientX, event.clientY);
    return place && place.startContainer === node ? place.startOffset : null;
  }
  function tokenAt(lane, offset) {
    let start = 0;
    for (const [index, [length, probability, alternatives]] of lane.tokens.entries()) {
      if (offset < start + length) return { index, start, end: start + length, probability, alternatives };
      start += length;
    }
    return null;
  }
  function hide() {
    tip.hidden = true;
    CSS.highlights?.delete(`kv-hover-${laneId}`);
  }
  function show(event) {
    const lane = KVLens.feed.latest?.lanes?.find((one) => one.id === laneId);
    const node = lane?.tokens && KVLens.answers.answerNode(laneId);
    const offset = node ? offsetAt(event, node) : null;
    const token = offset === null ? null : tokenAt(lane, offset);
    if (!token) return hide();
    const words = KVLens.text.chat;
    const rows = token.alternatives.map(([piece, probability]) => make("tr", {},
      make("td", { text: JSON.stringify(piece).slice(1, -1).replaceAll(" ", "␣") }), make("td", { text: units.percent(probability) }),
      make("td", {}, make("i", { style: { width: `${60 * probability}px` } }))));
    tip.replaceChildren(
      make("b", { text: `${token.index + 1} · ${KVLens.fill(words.probability, { p: units.percent(token.probability) })}` }),
      make("table", {}, ...rows));
    if (KVLens.feed.latest.difference === token.index) tip.append(make("em", { text: words.parted_here }));
    tip.hidden = false;
    const box = KVLens.answers.range(node, token.start, token.end).getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(innerWidth - tip.offsetWidth - 8, box.left))}px`;
    tip.style.top = `${box.bottom + tip.offsetHeight + 10 > innerHeight ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
    if (typeof Highlight !== "undefined") {
      CSS.highlights.set(`kv-hover-${laneId}`, new Highlight(KVLens.answers.range(node, token.start, token.end)));
    }
    return undefined;
  }
  const chat = () => document.querySelector(`#kv-chat-${laneId}`);
  document.addEventListener("pointermove", (event) => {
    if (chat()?.contains(event.target)) show(event);
    else if (!tip.hidden) hide();
  }, { passive: true });
  document.addEventListener("scroll", hide, { passive: true, capture: true });
};

// The line above the lanes: a recorded run, waiting, or what a person should know.
KVLens.statusLine = (component) => {
  const { make, setText } = KVLens;
  const root = component.element.querySelector(".kv-status");
  const words = KVLens.text.chat;
  const label = make("span", { class: "kv-status-label" });
  const hint = make("span", { class: "kv-status-hint" });
  const replay = make("button", { type: "button", class: "kv-quiet", text: words.replay, on: { click: play } });
  const notice = make("div", { class: "kv-notice", role: "alert" });
  const machine = make("span", { class: "kv-status-machine", text: KVLens.machineNote.text });
  KVLens.machineNote.show = (text) => setText(machine, text);
  root.append(make("div", { class: "kv-status-line" }, label, hint, replay, machine), notice);
  // `?replay_rate=50` plays at so many tokens/s a lane (benchmarks/replay.py); without it, at the run's own speed.
  function play() {
    component.trigger("replay", { rate: Number(new URLSearchParams(location.search).get("replay_rate")) || null });
  }
  KVLens.feed.listen((payload) => {
    const isRecorded = payload.state === "recorded" || payload.state === "replay";
    setText(label, isRecorded ? payload.label : "");
    const hints = { recorded: words.recorded_hint, waiting: words.waiting, loading: words.loading, reading: words.reading };
    setText(hint, hints[payload.state] || "");
    replay.hidden = payload.state !== "recorded";
    root.classList.toggle("kv-is-recorded", isRecorded);
    setText(notice, (payload.notices || []).join("  "));
    root.classList.toggle("kv-has-notice", notice.textContent !== "");
  });
};

// What to say about the machine (the header knows it) stands at the end of the status line.
KVLens.machineNote = (text) => {
  KVLens.machineNote.text = text;
  KVLens.machineNote.show(text);
};
KVLens.machineNote.text = "";
KVLens.machineNote.show = () => {};
