// A page that is opened from the disk may not start a worker. The search of the site needs
// one, so here an iframe stands in for it.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super();
    const iframe = document.createElement("iframe");
    iframe.hidden = true;
    document.body.append(iframe);
    this.inner = iframe.contentWindow;
    const inside = () => {
      window.postMessage = (data) => parent.postMessage(data, "*");
      window.importScripts = (...urls) =>
        urls.reduce((before, url) => before.then(() => new Promise((done) => {
          const script = document.createElement("script");
          script.src = url;
          script.onload = done;
          document.body.append(script);
        })), Promise.resolve());
    };
    this.inner.document.write(`<body><script>(${inside})()</script><script src="${url}"></script>`);
    this.inner.document.close();
    this.ready = new Promise((done) => { this.inner.onload = done; });
    window.addEventListener("message", ({ source, data }) => {
      if (source === this.inner) this.dispatchEvent(new MessageEvent("message", { data }));
    });
  }

  postMessage(data) {
    this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })));
  }

  terminate() {
    this.inner.frameElement.remove();
  }
}

if (location.protocol === "file:") window.Worker = IFrameWorker;
