const NUM_SAMPLES = 12;
const facts = JSON.parse(document.getElementById("facts").textContent);
const [channels, height, width] = facts.shape;
const size = channels * height * width;
const element = (id) => document.getElementById(id);

// --- The model ---

// Read a file that is embedded in the page or next to it.
const read = async (name) => {
  const held = document.querySelector(`script[data-file="${name}"]`);
  let bytes;
  if (held) {
    bytes = Uint8Array.from(atob(held.textContent), (letter) => letter.charCodeAt(0));
  } else {
    if (location.protocol === "file:") {
      throw new Error("Browsers do not let a page read other files from disk. Serve this folder (python -m http.server), or export with --single-file.");
    }
    const answer = await fetch(name);
    if (!answer.ok) throw new Error(`${name} is missing next to this page (${answer.status}). Copy the whole exported folder.`);
    bytes = new Uint8Array(await answer.arrayBuffer());
  }
  // Some servers decompress .gz files before sending them.
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
};

const blobURL = (content, type) => URL.createObjectURL(new Blob([content], { type }));

const worker = new Worker(blobURL(facts.worker, "text/javascript"));
const waiting = new Map();
let asked = 0;
const ask = (message, moved = []) => new Promise((resolve, reject) => {
  const id = asked++;
  waiting.set(id, { resolve, reject });
  worker.postMessage({ id, ...message }, moved);
});
worker.onmessage = ({ data: { id, value, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) resolve(value);
  else reject(new Error(error));
};
worker.onerror = (event) => fail(event.message || "The worker of this page cannot start.");

// Return a function that caches the result of `make` for each name, unless it fails.
const once = (make) => {
  const made = new Map();
  return (name) => {
    if (!made.has(name)) {
      made.set(name, make(name));
      made.get(name).catch(() => made.delete(name));
    }
    return made.get(name);
  };
};

const started = once(async () => {
  const [module, binary] = await Promise.all([read(facts.module), read(facts.binary)]);
  await ask({ call: "start", module, binary }, [binary.buffer]);
});

const opened = once(async (steps) => {
  const { file } = facts.graphs.find((graph) => graph.steps === steps);
  const [graph] = await Promise.all([read(file), started()]);
  await ask({ call: "open", name: steps, graph }, [graph.buffer]);
  // Warm up, because the first call is slower.
  await run(steps, noiseOf(0, size), 0, options());
});

const run = (steps, start, seed, { label, scale }) => {
  const names = facts.graphs.find((graph) => graph.steps === steps).inputs;
  const inputs = { noise: { type: "float32", data: start, dims: [1, ...facts.shape] } };
  if (names.includes("step_noise")) {
    // The last step draws no noise.
    const data = new Float32Array((steps - 1) * size);
    for (let step = 0; step < steps - 1; step++) data.set(noiseOf(seed, size, step), step * size);
    inputs.step_noise = { type: "float32", data, dims: [1, steps - 1, ...facts.shape] };
  }
  if (names.includes("class_labels")) {
    inputs.class_labels = { type: "int64", data: BigInt64Array.of(BigInt(label ?? seed % facts.classes)), dims: [1] };
  }
  if (names.includes("guidance_scale")) {
    inputs.guidance_scale = { type: "float32", data: Float32Array.of(scale), dims: [1] };
  }
  return ask({ call: "run", name: steps, inputs });
};

// Return {x0, milliseconds} for a sample from the noise `start`, with the step noise and class of `seed`.
const sampleFrom = async (start, seed, steps, asked) => {
  await opened(steps);
  return run(steps, start, seed, asked);
};
const sample = (seed, steps, asked) => sampleFrom(noiseOf(seed, size), seed, steps, asked);

// --- The page ---

const fail = (message) => {
  element("alert").textContent = message;
  element("alert").hidden = false;
  element("time").textContent = "";
};

const options = () => ({
  label: element("class").value === "" ? null : Number(element("class").value),
  scale: element("scale").valueAsNumber,
});
const chosenSteps = () => Number(document.querySelector("#steps input:checked").value);
const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
const rounded = (milliseconds) => (milliseconds < 10 ? milliseconds.toFixed(1) : milliseconds.toFixed(0));

const paint = (canvas, x0, label) => {
  canvas.width = width;
  canvas.height = height;
  canvas.classList.toggle("small", Math.max(width, height) <= 96);
  const pixels = new ImageData(width, height);
  for (let place = 0; place < width * height; place++) {
    for (let channel = 0; channel < 3; channel++) {
      pixels.data[4 * place + channel] = Math.round((x0[(channel % channels) * width * height + place] + 1) * 127.5);
    }
    pixels.data[4 * place + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  canvas.setAttribute("aria-label", label);
};

// Return a function that cancels its earlier calls and starts `task`, which fills the element `id`. A call waits until
// the previous one has stopped, and is skipped if a later call has arrived by then.
const newest = (id, task) => {
  let last = 0;
  let previous = Promise.resolve();
  const start = async (isNewest) => {
    if (!isNewest()) return;
    try {
      await task(isNewest);
      if (isNewest()) element("alert").hidden = true;
    } catch (error) {
      if (isNewest()) fail(error.message);
    }
    if (isNewest()) element(id).setAttribute("aria-busy", false);
  };
  return () => {
    const mine = ++last;
    element(id).setAttribute("aria-busy", true);
    previous = previous.then(() => start(() => mine === last));
    return previous;
  };
};

const drawSamples = newest("samples", async (isNewest) => {
  const [first, steps, asked] = [element("seed").valueAsNumber, chosenSteps(), options()];
  const times = [];
  for (const [index, figure] of [...element("samples").children].entries()) {
    const { x0, milliseconds } = await sample(first + index, steps, asked);
    if (!isNewest()) return;
    times.push(milliseconds);
    figure.lastChild.textContent = first + index;
    paint(figure.firstChild, x0, `Sample of seed ${first + index} in ${count(steps, "step")}`);
  }
  const median = times.sort((a, b) => a - b)[times.length >> 1];
  element("time").textContent = `${count(steps, "step")}, ${rounded(median)} ms per image`;
});

const drawFrame = newest("frame", async () => {
  const [from, to, share] = ["from", "to", "share"].map((id) => element(id).valueAsNumber);
  const steps = chosenSteps();
  const { x0, milliseconds } = await sampleFrom(
    between(noiseOf(from, size), noiseOf(to, size), share / 100), from, steps, options(),
  );
  // While the slider is dragged, outdated frames are shown, too. They are drawn one after another, so the last one stays.
  paint(element("frame"), x0, `Sample ${share} % of the way from seed ${from} to seed ${to}`);
  element("share").setAttribute("aria-valuetext", `${share} %`);
  element("frame-time").textContent = `${share} % of the way, ${count(steps, "step")}, ${rounded(milliseconds)} ms`;
});

const play = () => {
  const [slider, button] = [element("share"), element("play")];
  let direction = 1;
  let loop = 0;
  const move = async (mine) => {
    if (mine !== loop) return;
    const place = slider.valueAsNumber + direction;
    if (place < 0 || place > 100) direction = -direction;
    else slider.value = place;
    await drawFrame();
    setTimeout(move, 40, mine);
  };
  button.addEventListener("click", () => {
    const isOn = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", isOn);
    button.textContent = isOn ? "Pause" : "Play";
    // The loop of the previous click ends.
    loop++;
    if (isOn) move(loop);
  });
};

const build = () => {
  const choices = document.querySelector("#steps .choices");
  for (const { steps } of facts.graphs) {
    const label = document.createElement("label");
    label.innerHTML = `<input type="radio" name="steps" value="${steps}"><b>${steps}</b>`;
    choices.append(label);
  }
  choices.querySelector("input").checked = true;
  for (let label = 0; label < facts.classes; label++) element("class").add(new Option(label, label));
  element("class").parentElement.hidden = !facts.classes;
  if (facts.guidance) Object.assign(element("scale"), facts.guidance);
  element("scale").parentElement.hidden = !facts.guidance;
  element("scale").disabled = !facts.guidance;
  for (let index = 0; index < NUM_SAMPLES; index++) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "Not drawn yet");
    figure.append(canvas, document.createElement("figcaption"));
    element("samples").append(figure);
  }
  [element("frame").width, element("frame").height] = [width, height];
  element("frame").setAttribute("aria-label", "Not drawn yet");
  document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  const isValid = (form) => [...form.elements].every((field) => field.checkValidity());
  element("controls").addEventListener("input", () => {
    if (!isValid(element("controls"))) return;
    drawSamples();
    if (isValid(element("from").form)) drawFrame();
  });
  element("walk").addEventListener("input", () => {
    if (isValid(element("from").form) && isValid(element("controls"))) drawFrame();
  });
  const shift = (by) => {
    const seed = element("seed");
    seed.value = Math.min(Number(seed.max), Math.max(0, (seed.valueAsNumber || 0) + by));
    drawSamples();
  };
  element("previous").addEventListener("click", () => shift(-NUM_SAMPLES));
  element("next").addEventListener("click", () => shift(NUM_SAMPLES));
  play();
  element("licences").addEventListener("click", async (event) => {
    if (!document.querySelector(`script[data-file="${facts.licences}"]`)) return;
    event.preventDefault();
    open(blobURL(await read(facts.licences), "text/plain;charset=utf-8"));
  });
  document.querySelector("main").hidden = false;
};

if (typeof WebAssembly === "undefined" || typeof DecompressionStream === "undefined") {
  fail("This browser is too old for this page: it lacks WebAssembly or DecompressionStream. Update it.");
} else {
  build();
  drawSamples().then(drawFrame);
}
