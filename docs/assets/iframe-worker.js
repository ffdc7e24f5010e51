// Browsers start no workers for pages that are opened from a folder. There, the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.frame = frame;
      const scope = frame.contentWindow;
      scope.postMessage = (data) => setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })));
      scope.importScripts = (...urls) => urls.reduce((done, next) => done.then(() => this.load(next)), Promise.resolve());
      this.ready = this.load(url);
    }
    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.frame.contentDocument.createElement("script");
        Object.assign(script, { src: url, onload: resolve, onerror: reject });
        this.frame.contentDocument.body.append(script);
      });
    }
    postMessage(data) {
      const { MessageEvent: Event } = this.frame.contentWindow;
      this.ready.then(() => setTimeout(() => this.frame.contentWindow.dispatchEvent(new Event("message", { data }))));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
