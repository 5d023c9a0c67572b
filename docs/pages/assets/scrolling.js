/* Wide tables scroll inside a frame that the theme adds when a page loads; the keyboard must reach it. */
new MutationObserver(() => {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) frame.tabIndex = 0;
}).observe(document.documentElement, {childList: true, subtree: true});
