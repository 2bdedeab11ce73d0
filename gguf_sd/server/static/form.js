// The form: filled by the model's defaults or a picture's settings, read as what is to be painted.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["steps", "guidance", "width", "height", "count", "clip_skip"];
const OF_PICTURES = ["strength", "resize", "mask_blur"];
let facts = { models: [], samplers: {}, loras: [], limits: {} };

export function setUp(found) {
  facts = found;
  fillSelect($("model"), facts.models.map((m) => [m.name, `${m.name} (${m.type}, ${megabytes(m)})`]));
  fillSelect($("sampler"), Object.entries(facts.samplers).map(([name, s]) => [name, s.label]));
  $("width").max = $("height").max = facts.limits.size;
  $("steps").max = facts.limits.steps;
  $("count").max = facts.limits.count;
  $("model").addEventListener("change", defaults);
  $("sampler").addEventListener("change", () => schedules("model"));
  $("defaults").addEventListener("click", defaults);
  loraList();
  compareList();
  defaults();
}

export function model(name = $("model").value) {
  return facts.models.find((m) => m.name === name);
}

export function megabytes(m) {
  return `${(m.bytes / 1e6).toFixed(m.bytes < 1e8 ? 1 : 0)} MB`;
}

function fillSelect(select, pairs) {
  select.replaceChildren(...pairs.map(([value, label]) => new Option(label, value)));
}

function schedules(chosen) {
  const known = facts.samplers[$("sampler").value]?.schedules ?? [];
  fillSelect($("schedule"), known.map((name) => [name, name]));
  $("schedule").value = known.includes(chosen) ? chosen : known[0];
}

function defaults() {
  const values = model()?.defaults;
  if (!values) return;
  for (const name of ["steps", "guidance", "width", "height"]) $(name).value = values[name];
  for (const name of ["width", "height"]) $(name).step = $(name).min = model().multiple;
  $("clip_skip").value = "";
  $("sampler").value = values.sampler;
  schedules(values.schedule);
}

function loraList() {
  $("loras-none").hidden = facts.loras.length > 0;
  $("loras").replaceChildren(
    ...facts.loras.map((name) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.title = "Add to the prompt";
      button.addEventListener("click", () => {
        $("prompt").value = `${$("prompt").value} <lora:${name}:0.8>`.trimStart();
        $("prompt").focus();
      });
      item.append(button);
      return item;
    }),
  );
}

function compareList() {
  $("compare-box").hidden = facts.models.length < 2;
  $("compare").replaceChildren(
    ...facts.models.map((m) => {
      const label = document.createElement("label");
      label.className = "inline";
      const tick = document.createElement("input");
      tick.type = "checkbox";
      tick.value = m.name;
      label.append(tick, ` ${m.name} (${m.type}, ${megabytes(m)})`);
      return label;
    }),
  );
}

// The models to paint with: those ticked, else the one chosen.
export function models() {
  const ticked = [...$("compare").querySelectorAll("input:checked")].map((tick) => tick.value);
  return ticked.length ? ticked : [$("model").value];
}

// What the form says, without the picture to start from.
export function read(withPicture) {
  const settings = { prompt: $("prompt").value };
  if ($("negative_prompt").value) settings.negative_prompt = $("negative_prompt").value;
  for (const name of NUMBERS) if ($(name).value !== "") settings[name] = Number($(name).value);
  for (const name of ["sampler", "schedule"]) settings[name] = $(name).value;
  // As a text: it may be larger than JavaScript's numbers are exact. Drawn here, so that all models get the same.
  settings.seed = $("seed").value.trim() || String(Math.floor(Math.random() * 2 ** 32));
  if (withPicture) for (const name of OF_PICTURES) {
    settings[name] = name === "resize" ? $(name).value : Number($(name).value);
  }
  return settings;
}

// Fills the form with the settings of a picture; says what it could not take.
export function fill(settings) {
  const known =
    facts.models.find((m) => [m.name, m.file].includes(settings.model)) ??
    facts.models.find((m) => m.hash.startsWith(settings.model_hash || "?"));
  if (known) $("model").value = known.name;
  defaults();
  for (const name of ["prompt", "negative_prompt"]) $(name).value = settings[name] ?? "";
  for (const name of ["steps", "guidance", "width", "height", "clip_skip", "seed", "strength", "mask_blur"]) {
    if (settings[name] !== undefined) $(name).value = settings[name];
  }
  const sampler = findSampler(settings.sampler);
  if (sampler) $("sampler").value = sampler;
  schedules((settings.schedule ?? "model").toLowerCase().replaceAll(" ", "_"));
  return known || !settings.model ? "" : ` Its model ${settings.model} is not here.`;
}

function findSampler(label) {
  const wanted = (label ?? "").toLowerCase();
  return Object.keys(facts.samplers).find(
    (name) => name === wanted || facts.samplers[name].label.toLowerCase() === wanted,
  );
}
