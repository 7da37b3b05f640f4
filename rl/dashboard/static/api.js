// Questions to the server. A view's questions end with the view: `signal` aborts them.

export async function ask(path, query = {}, signal = undefined) {
  const words = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const response = await fetch(address(path) + (words.length ? "?" + new URLSearchParams(words) : ""), { signal });
  const answer = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw new Error(answer.error || `the server answered ${response.status}`);
  return answer;
}

export function address(parts) {
  return "/api/" + parts.map((part) => encodeURIComponent(part)).join("/");
}

// New lines of a run from `cursor` on. The browser reconnects by itself and sends the id of the last event it had.
export function follow(run, cursor, handlers, signal) {
  const source = new EventSource(address(["runs", run, "stream"]) + "?cursor=" + encodeURIComponent(cursor));
  const live = document.getElementById("live");
  source.onopen = () => { live.textContent = "live"; };
  source.onerror = () => { live.textContent = "reconnecting"; };
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  }
  signal.addEventListener("abort", () => { source.close(); live.textContent = ""; });
}
