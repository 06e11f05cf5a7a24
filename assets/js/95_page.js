// The page as a whole: keys, the address, downloads, the panels.
"use strict";

KVLens.panels = (component) => {
  const root = component.element.querySelector(".kv-panels");
  const panel = (name) => root.appendChild(KVLens.make("section", { class: `kv-panel kv-panel-${name}` }));
  const listeners = [
    KVLens.memoryPanel(panel("memory")),
    KVLens.errorPanel(panel("errors"), (view) => component.trigger("select", view)),
    KVLens.speedPanel(panel("speed")),
  ].map(KVLens.guarded);
  const off = new URLSearchParams(location.search).has("panels_off");
  // One panel a frame: three drawings in one frame would make it a long one.
  // A round draws one payload in all of them: what is asked for in its midst (another payload, or the same in other
  // colours) has the next round, or some would miss it.
  let [payload, drawn, turn, isAsked] = [null, null, 0, false];
  function step() {
    if (turn === 0) [drawn, isAsked] = [payload, false];
    listeners[turn](drawn);
    turn = (turn + 1) % listeners.length;
    if (turn > 0 || isAsked) requestAnimationFrame(step);
    else payload = null;
  }
  KVLens.feed.listen((latest) => {
    if (off) return;
    const isIdle = payload === null;
    [payload, isAsked] = [latest, true];
    if (isIdle) step();
  });
  KVLens.follow(component, KVLens.feed.receive);
};

// Python writes the address and its remarks on the lanes' settings; the page shows them and says when they are old.
// One event does all the noting: two on their way at once could come back in the wrong order.
KVLens.address = (component) => {
  let [isRestored, noted] = [false, ""];
  KVLens.follow(component, (text) => {
    if (!text) return;
    isRestored = true;
    const { query, remarks } = JSON.parse(text);
    KVLens.onRemarks.tell(remarks);
    const kept = new URLSearchParams(location.search);
    const next = new URLSearchParams(query);
    for (const name of ["__theme", "panels_off", "replay_rate"]) if (kept.has(name)) next.set(name, kept.get(name));
    const search = next.toString();
    history.replaceState(null, "", search ? `?${search}` : location.pathname);
  });
  const note = () => { if (isRestored) component.trigger("apply"); };
  KVLens.onModel(note);
  KVLens.onLearning((word) => { if (word.state === "done") note(); });
  KVLens.feed.listen((payload) => {
    if (payload.state !== "done" || payload.run_id === noted) return;
    noted = payload.run_id;
    note();
  });
};

KVLens.download = (component) => {
  component.watch("value", () => {
    if (!component.props.value) return;
    const { name, mime, data } = JSON.parse(component.props.value);
    const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
    const link = KVLens.make("a", { href: URL.createObjectURL(new Blob([bytes], { type: mime })), download: name });
    document.body.append(link);
    link.click();
    setTimeout(() => { URL.revokeObjectURL(link.href); link.remove(); }, 1000);
  });
};

document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.isContentEditable;
  if (event.key === "Escape") document.querySelector("#kv-stop:not([disabled])")?.click();
  else if (event.key === "/" && !isTyping) {
    document.querySelector("#kv-prompt textarea")?.focus();
    event.preventDefault();
  } else if (event.key === "?" && !isTyping) document.querySelector("#kv-help")?.click();
});

// Components that were there first are waiting for all of the above.
dispatchEvent(new Event("kvlens"));
