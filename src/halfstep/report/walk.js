(() => {
  const walk = document.getElementById("walk");
  if (!walk) return;
  const slider = walk.querySelector("input");
  const text = walk.querySelector("output");
  const frames = [...walk.querySelectorAll("[data-label]")];
  const show = () => {
    frames.forEach((frame, index) => { frame.hidden = index !== Number(slider.value); });
    text.textContent = frames[slider.value].dataset.label;
    slider.setAttribute("aria-valuetext", text.textContent);
  };
  slider.addEventListener("input", show);
  walk.hidden = false;
  show();
})();
