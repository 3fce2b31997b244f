"""What the two rasterisers and the painter must agree on: materials and how a texture wraps a head."""

PLAIN = -1
"""Material: the interpolated vertex colour."""
EYE = -2
"""Material: an eyeball. The vertex colour is the iris; the chart's z tells pupil, iris and white apart."""
TEXTURED = 0
"""Material: the texture of the mesh, looked up by the direction of the chart coordinates."""

TEXTURE_LOW_DEG = -70.0
TEXTURE_HIGH_DEG = 90.0
"""Elevations of a texture's last and first row; its columns go round from azimuth -180 to 180 degrees."""

IRIS_COSINE = 0.80
PUPIL_COSINE = 0.945
WHITE = 0.93

NEAR_M = 0.05
"""Triangles that come nearer to the camera are not drawn."""
WRAP = 0.2
"""Diffuse light reaches this far round the edge of a shape."""
GLOSS = 20.0
