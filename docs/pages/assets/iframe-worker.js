/* Search on pages that were opened from the disk: browsers refuse a Worker there, so its script runs in a hidden frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      frame.srcdoc = "<!doctype html>";
      frame.addEventListener("load", () => {
        const inside = frame.contentWindow;
        const run = (source) => new Promise((done, failed) => {
          const script = inside.document.createElement("script");
          Object.assign(script, {src: source, onload: done, onerror: failed});
          inside.document.head.append(script);
        });
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
        inside.importScripts = async (...sources) => { for (const source of sources) await run(source); };
        run(url).then(() => {
          this.inside = inside;
          this.waiting.splice(0).forEach((data) => this.postMessage(data));
        });
      }, {once: true});
      document.body.append(frame);
    }

    postMessage(data) {
      if (!this.inside) this.waiting.push(data);
      else this.inside.dispatchEvent(new this.inside.MessageEvent("message", {data}));
    }
  };
}
