// A link's secret stands in the fragment only: it leaves the address bar and the history at once.
if (location.hash) history.replaceState(null, "", location.pathname);

const answer = await fetch("/healthz", { cache: "no-store" });
document.getElementById("state").textContent = answer.ok
  ? "This node is well."
  : "This node is being stopped.";
