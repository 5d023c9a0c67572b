// Runs the graphs in a worker with onnxruntime's WebAssembly, so that the page stays responsive.
let ort;
const sessions = new Map();

const calls = {
  async start({ module, binary }) {
    // The module is imported from a data URL, because WebKit refuses to import a blob if the page was opened from disk.
    ort = await import(`data:text/javascript,${encodeURIComponent(new TextDecoder().decode(module))}`);
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = binary;
  },
  async open({ name, graph }) {
    sessions.set(name, await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] }));
  },
  async run({ name, inputs }) {
    const feeds = {};
    for (const [key, { type, data, dims }] of Object.entries(inputs)) feeds[key] = new ort.Tensor(type, data, dims);
    const start = performance.now();
    const { x0 } = await sessions.get(name).run(feeds);
    return { x0: x0.data, milliseconds: performance.now() - start };
  },
};

onmessage = async ({ data }) => {
  try {
    postMessage({ id: data.id, value: await calls[data.call](data) });
  } catch (error) {
    postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
};
