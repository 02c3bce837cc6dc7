"use strict";
/* Token viewer: one completion at a time, every token coloured by a signal. Text only ever enters as textContent. */
(() => {
  const root = document.getElementById("viewer");
  if (!root) return;
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const $ = (name) => root.querySelector(`[data-part="${name}"]`);
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (v, digits = 3) => (v === null || v === undefined ? "n/a" : v.toFixed(digits).replace("-", "−"));
  const signed = (v) => (v === null || v === undefined ? "n/a" : (v > 0 ? "+" : "") + number(v));
  const unique = (values) => [...new Set(values)];

  const state = { run: null, step: null, sample: null, view: data.views[0] || null, token: null };

  const valueAt = (sample, view, i) => {
    const parts = view.parts.map((name) => (sample.signals[name] || [])[i]);
    if (parts.some((v) => v === null || v === undefined)) return null;
    return parts.length === 2 ? parts[0] - parts[1] : parts[0];
  };

  // One scale per signal over all samples, so that colours mean the same everywhere; the 98th percentile keeps a
  // few extreme tokens from washing out the rest.
  const limits = new Map();
  const limitOf = (view) => {
    if (!limits.has(view.name)) {
      const sizes = [];
      for (const sample of data.samples)
        for (let i = 0; i < sample.tokens.length; i++) {
          const v = valueAt(sample, view, i);
          if (v !== null) sizes.push(Math.abs(v));
        }
      sizes.sort((a, b) => a - b);
      limits.set(view.name, sizes[Math.min(sizes.length - 1, Math.floor(sizes.length * 0.98))] || 1);
    }
    return limits.get(view.name);
  };

  const paint = (node, value, limit) => {
    node.classList.toggle("na", value === null);
    node.classList.toggle("pos", value !== null && value >= 0);
    node.classList.toggle("neg", value !== null && value < 0);
    node.style.setProperty("--a", value === null ? 0 : (Math.min(Math.abs(value) / limit, 1) * 0.72).toFixed(3));
  };

  const MARKS = { " ": "·", "\n": "⏎", "\t": "→", "\r": "␍", "\u00a0": "⍽" };
  const writeToken = (node, text) => {
    if (text === "") node.append(make("span", "ws", "∅"));
    for (const piece of text.split(/([ \n\t\r\u00a0])/)) {
      if (piece === "") continue;
      if (piece in MARKS) {
        node.append(make("span", "ws", MARKS[piece]));
        if (piece === "\n") node.append(document.createElement("br"));
      } else node.append(piece);
    }
  };

  const fill = (select, values, label) => {
    select.replaceChildren(
      ...values.map((value, i) => {
        const option = make("option", "", label(value));
        option.value = String(i);
        return option;
      }),
    );
    select.closest("label").hidden = values.length < 2;
  };
  const choose = (select, values, value) => (select.value = String(Math.max(values.indexOf(value), 0)));

  const runs = unique(data.samples.map((s) => s.run));
  const stepsOf = (run) => unique(data.samples.filter((s) => s.run === run).map((s) => s.step));
  const samplesOf = (run, step) => data.samples.filter((s) => s.run === run && s.step === step);

  const setRun = (run) => {
    state.run = run;
    const steps = stepsOf(run);
    fill($("step"), steps, (step) => (step === null ? "none" : String(step)));
    choose($("run"), runs, run);
    setStep(steps[steps.length - 1]);
  };
  const setStep = (step) => {
    state.step = step;
    choose($("step"), stepsOf(state.run), step);
    const samples = samplesOf(state.run, step);
    $("samples").replaceChildren(
      ...samples.map((sample) => {
        const button = make("button", "sample");
        button.type = "button";
        button.append(make("span", "sample-id", String(sample.prompt_id)));
        button.append(make("span", "sample-reward " + tone(sample.reward), number(sample.reward, 2)));
        button.addEventListener("click", () => setSample(sample));
        return button;
      }),
    );
    setSample(samples[0]);
  };
  const tone = (reward) => (reward === null ? "unknown" : reward >= 0.5 ? "good" : "bad");

  const setSample = (sample) => {
    state.sample = sample;
    const samples = samplesOf(state.run, state.step);
    [...$("samples").children].forEach((node, i) =>
      node.setAttribute("aria-pressed", String(samples[i] === sample)),
    );
    $("prompt").textContent = sample.prompt === null ? "" : sample.prompt;
    const facts = [["reward", number(sample.reward)]];
    for (const [name, v] of Object.entries(sample.components || {}))
      facts.push([name, typeof v === "number" ? number(v) : String(v ?? "n/a")]);
    if (sample.answer !== null)
      facts.push(["expected", typeof sample.answer === "string" ? sample.answer : JSON.stringify(sample.answer)]);
    facts.push(["domain", sample.domain], ["tokens", sample.tokens.length], ["finish", sample.finish]);
    $("facts").replaceChildren(
      ...facts
        .filter(([, v]) => v !== null && v !== undefined)
        .map(([name, v]) => {
          const fact = make("span", "fact");
          fact.append(make("span", "fact-name", name), make("span", "fact-value", String(v)));
          return fact;
        }),
    );
    const nodes = sample.tokens.map((text, i) => {
      const node = make("span", "token");
      node.dataset.index = String(i);
      writeToken(node, text);
      return node;
    });
    $("tokens").replaceChildren(...nodes);
    hide();
    colour();
  };

  const colour = () => {
    const { sample, view } = state;
    if (!view) return;
    const limit = limitOf(view);
    const values = sample.tokens.map((_, i) => valueAt(sample, view, i));
    [...$("tokens").children].forEach((node, i) => paint(node, values[i], limit));
    $("low").textContent = "≤ −" + limit.toPrecision(3);
    $("high").textContent = "≥ +" + limit.toPrecision(3);
    const known = values.filter((v) => v !== null);
    $("mean").textContent = known.length
      ? `mean of this completion ${signed(known.reduce((a, b) => a + b, 0) / known.length)}`
      : "this completion has no such signal";
    strip(values, limit);
  };

  const SVG = "http://www.w3.org/2000/svg";
  const strip = (values, limit) => {
    const svg = $("strip");
    svg.setAttribute("viewBox", `0 0 ${Math.max(values.length, 1)} 2`);
    svg.replaceChildren(
      ...values.map((v, i) => {
        const bar = document.createElementNS(SVG, "rect");
        const height = v === null ? 0 : Math.min(Math.abs(v) / limit, 1);
        bar.setAttribute("x", i + 0.08);
        bar.setAttribute("width", 0.84);
        bar.setAttribute("y", v > 0 ? 1 - height : 1);
        bar.setAttribute("height", height);
        bar.setAttribute("class", v > 0 ? "pos" : "neg");
        return bar;
      }),
    );
  };

  const tip = $("tip");
  const hide = () => {
    tip.hidden = true;
    state.token = null;
    root.querySelectorAll(".token.current, rect.current").forEach((node) => node.classList.remove("current"));
  };
  const show = (i) => {
    const { sample, view } = state;
    const node = $("tokens").children[i];
    if (!node) return;
    hide();
    state.token = i;
    node.classList.add("current");
    $("strip").children[i].classList.add("current");
    tip.replaceChildren();
    const head = make("div", "tip-head");
    head.append(make("code", "", JSON.stringify(sample.tokens[i])), make("span", "", `${i + 1} / ${sample.tokens.length}`));
    tip.append(head);
    const table = make("table");
    const row = (name, value, extra, active) => {
      const line = make("tr", active ? "active" : "");
      line.append(make("td", "", name), make("td", "num", value), make("td", "num faint", extra));
      table.append(line);
    };
    for (const v of data.views) {
      const value = valueAt(sample, v, i);
      const logp = v.parts.length === 1 && data.logps.includes(v.parts[0]);
      const name = logp ? `log p ${v.parts[0]}` : v.name;
      const chance = logp && value !== null ? `p ${(100 * Math.exp(value)).toPrecision(3)}%` : "";
      row(name, logp ? number(value) : signed(value), chance, view && v.name === view.name);
    }
    tip.append(table);
    tip.hidden = false;
    const box = node.getBoundingClientRect();
    const width = tip.offsetWidth;
    const height = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - width - 8);
    const above = box.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
  };

  const tokens = $("tokens");
  tokens.addEventListener("pointerover", (event) => {
    const node = event.target.closest(".token");
    if (node) show(Number(node.dataset.index));
  });
  tokens.addEventListener("pointerleave", hide);
  $("strip").addEventListener("pointermove", (event) => {
    const box = $("strip").getBoundingClientRect();
    const n = state.sample.tokens.length;
    show(Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * n))));
  });
  $("strip").addEventListener("pointerleave", hide);
  tokens.addEventListener("blur", hide);
  tokens.addEventListener("keydown", (event) => {
    const n = state.sample.tokens.length;
    const at = state.token === null ? -1 : state.token;
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: n - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (next === undefined) return;
    event.preventDefault();
    show(Math.min(n - 1, Math.max(0, next)));
  });
  window.addEventListener("scroll", hide, { passive: true });

  $("run").addEventListener("change", (event) => setRun(runs[Number(event.target.value)]));
  $("step").addEventListener("change", (event) => setStep(stepsOf(state.run)[Number(event.target.value)]));
  $("signal").addEventListener("change", (event) => {
    state.view = data.views[Number(event.target.value)];
    colour();
  });

  fill($("run"), runs, String);
  fill($("signal"), data.views, (view) => view.name);
  $("signal").closest("label").hidden = !data.views.length;
  $("legend").hidden = !data.views.length;
  if (data.samples.length) setRun(runs[runs.length - 1]);
})();
