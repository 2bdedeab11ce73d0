// What the page asks of the server.

let key = sessionStorage.getItem("key");

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    key = await askForKey();
    sessionStorage.setItem("key", key);
    return ask(path, options);
  }
  if (!answer.ok) throw new Error(await sentence(answer));
  return answer;
}

async function sentence(answer) {
  const body = await answer.json().catch(() => ({}));
  return body.detail || `the server answered ${answer.status}`;
}

function askForKey() {
  const dialog = document.getElementById("key-dialog");
  const field = document.getElementById("key");
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(field.value), { once: true }));
}

export async function facts() {
  return (await ask("/api/models")).json();
}

// The settings that a picture carries.
export async function settingsOf(blob) {
  return (await ask("/api/settings", { method: "POST", body: blob })).json();
}

// Paints; calls tell(event) for every event until the end. Aborting the signal cancels.
export async function paint(settings, signal, tell) {
  const answer = await ask("/api/paint", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(settings),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) tell(JSON.parse(line));
  }
}
