"""What the scripts here share: other libraries' methods as contexts, and two contexts timed in pairs."""

from contextlib import contextmanager

from hasten.measure.timing import compare


@contextmanager
def deepcache(pipe, settings):
    """The package DeepCache on the pipeline."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(**settings)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def dit(pipe, settings):
    """cache-dit's DBCache on the pipeline."""
    import cache_dit

    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**settings))
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


@contextmanager
def tomesd(pipe, settings):
    """The package tomesd on the pipeline."""
    import tomesd as package

    package.apply_patch(pipe, **settings)
    try:
        yield
    finally:
        package.remove_patch(pipe)


def paired(draw, before, after, pairs):
    """`draw()` in the context `before()` and in `after()`, in pairs; how much faster the second is."""

    def run(side):
        def call():
            with side():
                return draw()

        return call

    return compare(run(before), run(after), pairs=pairs).speedup
