// The one stream of payloads: the latest wins, at most one drawing a frame.
"use strict";

KVLens.feed = (() => {
  const listeners = [];
  let latest = null;
  let isQueued = false;

  function draw() {
    isQueued = false;
    if (latest === null) return;
    const started = performance.now();
    for (const listener of listeners) listener(latest);
    KVLens.feed.lastDrawMs = performance.now() - started;
    KVLens.feed.drawn += 1;
  }
  function schedule() {
    if (isQueued) return;
    isQueued = true;
    requestAnimationFrame(draw);
  }
  return {
    drawn: 0,
    lastDrawMs: 0,
    listen(listener) {
      listeners.push(KVLens.guarded(listener));
      schedule();
    },
    redraw: schedule,
    get latest() { return latest; },
    // What cannot be read leaves the picture as it is.
    receive: KVLens.guarded((value) => {
      if (!value) return;
      const payload = JSON.parse(value);
      // A payload without a run keeps the picture and only changes state and notices.
      latest = payload.lanes || !latest || payload.state === "empty" ? payload : { ...latest, ...payload };
      document.body.dataset.kvState = latest.state;
      schedule();
    }),
  };
})();

// A gr.HTML component feeds its value to `receive`, now and at each update from Python.
KVLens.follow = (component, receive) => {
  const hear = KVLens.guarded(() => receive(component.props.value));
  component.watch("value", hear);
  hear();
};

// A word from one part of the page to others: a listener hears the last one at once, and each `tell` after it.
KVLens.signal = (last) => {
  const listeners = [];
  const listen = (listener) => {
    const own = KVLens.guarded(listener);
    listeners.push(own);
    own(last);
  };
  listen.tell = (word) => { last = word; for (const listener of listeners) listener(word); };
  return listen;
};

KVLens.onModel = KVLens.signal("");
